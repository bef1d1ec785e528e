//! A host over HTTP: the Open Inference Protocol v2, feedback, administration and Prometheus metrics.
//!
//! Requests are decoded and answered on tokio's threads; models run on the host's workers, never here.

mod admin;
mod elements;
mod inference;
mod metrics;
mod protocol;

pub use elements::Elements;
pub use protocol::{InferRequest, InferResponse, InputTensor, OutputTensor, TensorMetadata};

use axum::{
    Json, Router,
    extract::{DefaultBodyLimit, FromRequest, Request},
    http::StatusCode,
    response::{IntoResponse, Response},
};
use cutover_runtime::Host;
use std::{
    io,
    net::{SocketAddr, TcpListener},
    sync::mpsc,
    thread,
};
use tokio::sync::oneshot;

/// How to serve.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// Longest body of a request, in bytes; longer ones are answered with 413.
    pub body_bytes_max: usize,
    /// Threads that read requests and write answers. Models run on the host's own.
    pub threads: usize,
    /// Whether `/cutover/v1/…` may change what is deployed. It has no access control yet, so bind it to loopback.
    pub administration: bool,
}

impl Default for ServerOptions {
    fn default() -> Self {
        ServerOptions { body_bytes_max: 64 << 20, threads: 2, administration: true }
    }
}

/// A server on a thread of its own, until it is dropped.
pub struct Server {
    address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<io::Result<()>>>,
}

impl Server {
    /// Serves `host` on `address` (port 0 for a free one).
    ///
    /// # Errors
    /// The address can't be listened on, or no thread can be started.
    pub fn start(host: Host, address: SocketAddr, options: &ServerOptions) -> io::Result<Server> {
        let listener = TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let (stop, stopped) = oneshot::channel();
        let (ready, started) = mpsc::channel();
        let app = router(host, options);
        let threads = options.threads.max(1);
        let thread = thread::Builder::new().name("cutover-http".to_string()).spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(threads)
                .thread_name("cutover-http")
                .enable_all()
                .build()?;
            runtime.block_on(async move {
                let listener = tokio::net::TcpListener::from_std(listener)?;
                let _ = ready.send(());
                axum::serve(listener, app).with_graceful_shutdown(async { drop(stopped.await) }).await
            })
        })?;
        // If the thread ended before it was ready, its error says why.
        if started.recv().is_err() {
            return Err(join(thread).err().unwrap_or_else(|| io::Error::other("the server ended at once")));
        }
        Ok(Server { address, stop: Some(stop), thread: Some(thread) })
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until this process is interrupted or told to end, then answers what it has and returns.
    ///
    /// # Errors
    /// The server failed, or signals can't be waited for.
    pub fn wait_for_signal(mut self) -> io::Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(signal())?;
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
        self.thread.take().map_or(Ok(()), join)
    }
}

/// Takes no more requests, answers those it has, and ends.
impl Drop for Server {
    fn drop(&mut self) {
        if let (Some(stop), Some(thread)) = (self.stop.take(), self.thread.take()) {
            let _ = stop.send(());
            let _ = join(thread);
        }
    }
}

#[cfg(unix)]
async fn signal() -> io::Result<()> {
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    tokio::select! {
        interrupted = tokio::signal::ctrl_c() => interrupted,
        _ = terminate.recv() => Ok(()),
    }
}

#[cfg(not(unix))]
async fn signal() -> io::Result<()> {
    tokio::signal::ctrl_c().await
}

fn join(thread: thread::JoinHandle<io::Result<()>>) -> io::Result<()> {
    thread.join().unwrap_or_else(|_| Err(io::Error::other("the server's thread panicked")))
}

/// Everything that is served, for whoever has a tokio runtime already.
pub fn router(host: Host, options: &ServerOptions) -> Router {
    let mut router = inference::routes().merge(metrics::routes()).merge(admin::feedback_routes());
    if options.administration {
        router = router.merge(admin::routes());
    }
    let unknown = || async { Failure::new(StatusCode::NOT_FOUND, "no such path; /v2 says what is served") };
    let method = async || Failure::new(StatusCode::METHOD_NOT_ALLOWED, "this path does not take that method");
    router
        .fallback(unknown)
        .method_not_allowed_fallback(method)
        .layer(DefaultBodyLimit::max(options.body_bytes_max))
        .with_state(host)
}

/// What an error looks like on the wire: a status, and `{"error": "…"}`.
#[derive(Debug)]
struct Failure {
    status: StatusCode,
    message: String,
}

impl Failure {
    fn new(status: StatusCode, message: impl Into<String>) -> Failure {
        Failure { status, message: message.into() }
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        (self.status, Json(serde_json::json!({ "error": self.message }))).into_response()
    }
}

/// The bytes of a body; errors look like every other error here.
struct Bytes(bytes::Bytes);

impl<S: Send + Sync> FromRequest<S> for Bytes {
    type Rejection = Failure;

    async fn from_request(request: Request, state: &S) -> Result<Bytes, Failure> {
        let bytes = bytes::Bytes::from_request(request, state).await;
        Ok(Bytes(bytes.map_err(|rejection| Failure::new(rejection.status(), rejection.body_text()))?))
    }
}

/// A body of JSON. The content type is not looked at: curl's default is a form's.
struct Body<T>(T);

impl<S: Send + Sync, T: serde::de::DeserializeOwned> FromRequest<S> for Body<T> {
    type Rejection = Failure;

    async fn from_request(request: Request, state: &S) -> Result<Body<T>, Failure> {
        let Bytes(bytes) = Bytes::from_request(request, state).await?;
        parse(&bytes).map(Body)
    }
}

fn parse<'a, T: serde::Deserialize<'a>>(body: &'a [u8]) -> Result<T, Failure> {
    let bad = |message: String| Failure::new(StatusCode::BAD_REQUEST, message);
    // serde takes an array for an object's fields in order, which no client means.
    if body.iter().find(|b| !b.is_ascii_whitespace()).is_some_and(|&b| b != b'{') {
        return Err(bad("the body: expected a JSON object".to_string()));
    }
    serde_json::from_slice(body).map_err(|e| bad(format!("the body: {e}")))
}
