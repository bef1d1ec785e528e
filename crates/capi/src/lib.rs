//! The C ABI over the facade: open a model, make a session, run it.
//!
//! `include/cutover.h` is generated from this file by a test, which fails where they differ. Every function catches panics; whatever
//! goes wrong is a status, and [`cutover_last_error`] says what. Nothing here is a feature of its own.
#![allow(unsafe_code)] // raw pointers are what C hands over

use cutover::{CompiledModel, DType, Device, DeviceOptions, Model, Session, Shape, Tensor, TensorView, Value};
use std::{
    cell::RefCell,
    ffi::{CStr, CString, c_char, c_void},
    panic::{AssertUnwindSafe, catch_unwind},
    ptr,
};

/// What a call came to.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(non_camel_case_types)] // as C spells constants
pub enum CutoverStatus {
    CUTOVER_OK = 0,
    /// An argument is null, not UTF-8, or contradicts itself or the model.
    CUTOVER_ARGUMENT = 1,
    /// The file is no model that can be loaded and compiled.
    CUTOVER_MODEL = 2,
    /// The model could not be run on these inputs.
    CUTOVER_RUN = 3,
    /// A fault of this library. Free the object and make a new one.
    CUTOVER_PANIC = 4,
}

/// A compiled model: shared by any number of sessions, on any threads.
pub struct CutoverModel {
    compiled: CompiledModel,
    inputs: Vec<CString>,
    outputs: Vec<CString>,
}

/// One thread's memory for running a model.
pub struct CutoverSession {
    session: Session,
    outputs: Vec<CString>,
    /// What the last run gave; `CutoverTensor`s point into it.
    results: Vec<(Tensor, Vec<i64>)>,
}

/// A tensor that someone else owns. Elements are row-major and packed; `dtype` is ONNX's `TensorProto.DataType` (1 is f32, 7 is i64).
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct CutoverTensor {
    pub name: *const c_char,
    pub dtype: i32,
    pub rank: usize,
    pub shape: *const i64,
    pub data: *const c_void,
    pub data_bytes: usize,
}

thread_local! {
    static LAST_ERROR: RefCell<CString> = RefCell::default();
}

struct Failure(CutoverStatus, String);

impl Failure {
    fn argument(message: impl Into<String>) -> Failure {
        Failure(CutoverStatus::CUTOVER_ARGUMENT, message.into())
    }
}

/// Runs `body`, and keeps what went wrong for this thread.
fn guarded(body: impl FnOnce() -> Result<(), Failure>) -> CutoverStatus {
    let outcome = catch_unwind(AssertUnwindSafe(body));
    let (status, message) = match outcome {
        Ok(Ok(())) => return CutoverStatus::CUTOVER_OK,
        Ok(Err(Failure(status, message))) => (status, message),
        Err(_) => (CutoverStatus::CUTOVER_PANIC, "cutover panicked".to_string()),
    };
    let message = CString::new(message.replace('\0', " ")).unwrap_or_default();
    LAST_ERROR.with(|last| *last.borrow_mut() = message);
    status
}

/// The library's version, e.g. "0.1.0".
#[unsafe(no_mangle)]
pub extern "C" fn cutover_version() -> *const c_char {
    concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast()
}

/// What the last failed call on this thread failed for; valid until the next call on this thread.
#[unsafe(no_mangle)]
pub extern "C" fn cutover_last_error() -> *const c_char {
    LAST_ERROR.with(|last| last.borrow().as_ptr())
}

/// Opens an .onnx file, a package folder or a .cutover archive and compiles it for the CPU with `threads` threads, the caller's
/// included; 0 for one per core. Files are mapped: nobody may change them while the model is in use.
///
/// # Safety
/// `path` is a string that ends in 0; `model` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cutover_model_open(
    path: *const c_char,
    threads: usize,
    model: *mut *mut CutoverModel,
) -> CutoverStatus {
    guarded(|| {
        if model.is_null() {
            return Err(Failure::argument("model is null"));
        }
        // SAFETY: the caller vouches for both.
        let path = unsafe {
            model.write(ptr::null_mut());
            text("path", path)?
        };
        let failed = |e: cutover::Error| Failure(CutoverStatus::CUTOVER_MODEL, e.to_string());
        let options = DeviceOptions { threads: (threads > 0).then_some(threads), ..DeviceOptions::default() };
        let compiled = Model::open(path).and_then(|m| m.compile_with(Device::Auto, &options)).map_err(failed)?;
        let names = |bindings: &[cutover::backend::Binding]| {
            let name = |b: &cutover::backend::Binding| CString::new(b.name.clone());
            bindings.iter().map(name).collect::<Result<Vec<_>, _>>()
        };
        let no_zero = |_| Failure(CutoverStatus::CUTOVER_MODEL, "a name of the model holds a zero byte".to_string());
        let inputs = names(&compiled.signature().inputs).map_err(no_zero)?;
        let outputs = names(&compiled.signature().outputs).map_err(no_zero)?;
        // SAFETY: checked above.
        unsafe { model.write(Box::into_raw(Box::new(CutoverModel { compiled, inputs, outputs }))) };
        Ok(())
    })
}

/// Frees a model; null is ignored. Its sessions stay valid.
///
/// # Safety
/// `model` came from `cutover_model_open` and was not freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cutover_model_free(model: *mut CutoverModel) {
    if !model.is_null() {
        // SAFETY: the caller vouches for it.
        let model = unsafe { Box::from_raw(model) };
        let _ = catch_unwind(AssertUnwindSafe(|| drop(model)));
    }
}

/// The name of input `index`, or null where there are fewer. Valid as long as the model.
///
/// # Safety
/// `model` is a model that was not freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cutover_model_input(model: *const CutoverModel, index: usize) -> *const c_char {
    // SAFETY: the caller vouches for it.
    unsafe { model.as_ref() }.and_then(|m| m.inputs.get(index)).map_or(ptr::null(), |n| n.as_ptr())
}

/// The name of output `index`, or null where there are fewer. Valid as long as the model.
///
/// # Safety
/// `model` is a model that was not freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cutover_model_output(model: *const CutoverModel, index: usize) -> *const c_char {
    // SAFETY: the caller vouches for it.
    unsafe { model.as_ref() }.and_then(|m| m.outputs.get(index)).map_or(ptr::null(), |n| n.as_ptr())
}

/// Makes a session, for one thread at a time.
///
/// # Safety
/// `model` is a model that was not freed; `session` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cutover_session_new(
    model: *const CutoverModel,
    session: *mut *mut CutoverSession,
) -> CutoverStatus {
    guarded(|| {
        if session.is_null() {
            return Err(Failure::argument("session is null"));
        }
        // SAFETY: the caller vouches for both.
        let model = unsafe {
            session.write(ptr::null_mut());
            model.as_ref()
        };
        let model = model.ok_or_else(|| Failure::argument("model is null"))?;
        let made = model.compiled.session().map_err(|e| Failure(CutoverStatus::CUTOVER_RUN, e.to_string()))?;
        let made = CutoverSession { session: made, outputs: model.outputs.clone(), results: Vec::new() };
        // SAFETY: checked above.
        unsafe { session.write(Box::into_raw(Box::new(made))) };
        Ok(())
    })
}

/// Frees a session; null is ignored.
///
/// # Safety
/// `session` came from `cutover_session_new` and was not freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cutover_session_free(session: *mut CutoverSession) {
    if !session.is_null() {
        // SAFETY: the caller vouches for it.
        let session = unsafe { Box::from_raw(session) };
        let _ = catch_unwind(AssertUnwindSafe(|| drop(session)));
    }
}

/// Runs the model on `inputs`, found by their names. On success the first `output_count` outputs are filled in, in the model's order;
/// what they point to stays valid until the session runs again or is freed.
///
/// # Safety
/// `session` was not freed and is used by no other thread; `inputs` and `outputs` have as many elements as their counts say, and each
/// input's pointers are valid for the lengths beside them.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cutover_session_run(
    session: *mut CutoverSession,
    inputs: *const CutoverTensor,
    input_count: usize,
    outputs: *mut CutoverTensor,
    output_count: usize,
) -> CutoverStatus {
    guarded(|| {
        // SAFETY: the caller vouches for all of it.
        let session = unsafe { session.as_mut() }.ok_or_else(|| Failure::argument("session is null"))?;
        if (inputs.is_null() && input_count > 0) || (outputs.is_null() && output_count > 0) {
            return Err(Failure::argument("inputs or outputs are null"));
        }
        if output_count > session.outputs.len() {
            let message = format!("{output_count} outputs asked for, the model has {}", session.outputs.len());
            return Err(Failure::argument(message));
        }
        // SAFETY: as above.
        let given = if input_count == 0 { &[] } else { unsafe { std::slice::from_raw_parts(inputs, input_count) } };
        let mut named = Vec::with_capacity(given.len());
        for tensor in given {
            // SAFETY: as above.
            named.push(unsafe { read(tensor)? });
        }
        let views: Vec<(&str, TensorView<'_>)> = named.iter().map(|(n, t)| (n.as_str(), t.view())).collect();
        let answers = session.session.run(views).map_err(|e| Failure(CutoverStatus::CUTOVER_RUN, e.to_string()))?;
        session.results.clear();
        for (name, value) in answers {
            let Value::Tensor(tensor) = value else {
                return Err(Failure(CutoverStatus::CUTOVER_RUN, format!("output '{name}' is not a tensor")));
            };
            let shape = tensor.shape().iter().map(|&d| d as i64).collect();
            session.results.push((tensor, shape));
        }
        for index in 0..output_count {
            let (tensor, shape) = &session.results[index];
            let filled = CutoverTensor {
                name: session.outputs[index].as_ptr(),
                dtype: tensor.dtype().onnx_code(),
                rank: shape.len(),
                shape: shape.as_ptr(),
                data: tensor.bytes().as_ptr().cast(),
                data_bytes: tensor.bytes().len(),
            };
            // SAFETY: the caller vouches for `output_count` of them.
            unsafe { outputs.add(index).write(filled) };
        }
        Ok(())
    })
}

/// # Safety
/// `text` is null or a string that ends in 0.
unsafe fn text<'a>(what: &str, text: *const c_char) -> Result<&'a str, Failure> {
    if text.is_null() {
        return Err(Failure::argument(format!("{what} is null")));
    }
    // SAFETY: the caller vouches for it.
    unsafe { CStr::from_ptr(text) }.to_str().map_err(|_| Failure::argument(format!("{what} is not UTF-8")))
}

/// # Safety
/// The tensor's pointers are null or valid for the lengths beside them.
unsafe fn read(tensor: &CutoverTensor) -> Result<(String, Tensor), Failure> {
    // SAFETY: the caller vouches for it.
    let name = unsafe { text("an input's name", tensor.name)? }.to_string();
    let wrong = |message: &str| Failure::argument(format!("input '{name}': {message}"));
    let dtype = DType::from_onnx_code(tensor.dtype).ok_or_else(|| wrong("dtype is not one of ONNX's"))?;
    if (tensor.shape.is_null() && tensor.rank > 0)
        || (tensor.data.is_null() && tensor.data_bytes > 0)
        || tensor.rank > 64
    {
        return Err(wrong("shape or data is null, or the rank above 64"));
    }
    // SAFETY: the caller vouches for both; null is only read where nothing is.
    let (shape, bytes) = unsafe {
        let shape = if tensor.rank == 0 { &[] } else { std::slice::from_raw_parts(tensor.shape, tensor.rank) };
        let data = tensor.data.cast::<u8>();
        (shape, if tensor.data_bytes == 0 { &[] } else { std::slice::from_raw_parts(data, tensor.data_bytes) })
    };
    let dims = shape.iter().map(|&d| usize::try_from(d)).collect::<Result<Shape, _>>();
    let dims = dims.map_err(|_| wrong("a dimension is negative"))?;
    let tensor = Tensor::from_bytes(dtype, dims, bytes).map_err(|e| wrong(&e.to_string()))?;
    Ok((name, tensor))
}
