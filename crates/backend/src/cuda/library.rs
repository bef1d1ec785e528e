//! cuBLASLt's matrix products, where that library is found.
//!
//! It counts columns first where we count rows: what is `[m, n]` here is `[n, m]` there, with the same leading extent and the same bytes, so
//! `C = A · B` is asked for as `Cᵀ = Bᵀ · Aᵀ`. What is added to each column is then added to each row, which is what its epilogues do. Their
//! GELU is the form with the hyperbolic tangent (XLA asks for it in place of no other), so the one by the error function is never asked of it. A
//! product is prepared once, with the algorithm that the library's heuristics put first, and what names addresses once a session; a run
//! allocates nothing, and the workspace is ours, so that it can be recorded.
#![allow(unsafe_code)] // a foreign interface

use super::api::{Context, Stream};
use crate::{
    ResourceError, RunError,
    gpu::{LibraryFunction, LibraryProduct},
};
use cudarc::cublaslt::{result as lt, sys};
use cutover_kernels::cuda::{Element, Order};
use std::{
    ffi::c_void,
    ptr::{self, NonNull},
    sync::Arc,
};

/// The oldest cuBLASLt that is asked, as it tells its version: 10000 · major + 100 · minor.
const OLDEST: usize = 120_000;

/// Workspace that a product may have, in bytes: what NVIDIA recommends for devices from compute capability 9.0 on.
const MOST_WORKSPACE: usize = 32 << 20;

/// Of every address that products are of, in bytes.
const ALIGNMENT: u64 = 256;

/// The library on a device.
pub(super) struct Library {
    context: Arc<Context>,
    handle: sys::cublasLtHandle_t,
}

// SAFETY: NVIDIA says that a handle may be used by several threads at once.
unsafe impl Send for Library {}
// SAFETY: as above.
unsafe impl Sync for Library {}

/// A product with the algorithm that was chosen for it.
pub(super) struct Prepared {
    library: Arc<Library>,
    product: LibraryProduct,
    algorithm: sys::cublasLtMatmulAlgo_t,
    pub workspace_bytes: usize,
}

/// A product of what lies at certain addresses.
pub(super) struct Call {
    library: Arc<Library>,
    description: Description,
    algorithm: sys::cublasLtMatmulAlgo_t,
    alpha: f32,
    beta: f32,
    a: u64,
    b: u64,
    /// What is added beta times; where nothing is, the result's place.
    residual: u64,
    to: u64,
    workspace: u64,
    workspace_bytes: usize,
}

/// What the library is told of a product.
struct Description {
    operation: sys::cublasLtMatmulDesc_t,
    /// Of what it takes as first and second factor, our second and first, and of the result.
    layouts: [sys::cublasLtMatrixLayout_t; 3],
}

// SAFETY: descriptions of our own, which nobody changes once they are made; the library reads them from any thread.
unsafe impl Send for Description {}

fn failed(error: lt::CublasError) -> String {
    format!("cuBLASLt: {error}")
}

impl Library {
    /// # Errors
    /// No library, one that is too old, or one that refuses the device.
    pub fn open(context: &Arc<Context>) -> Result<Arc<Library>, String> {
        // SAFETY: loading NVIDIA's library runs its initialisers, which is what whoever asks for CUDA asks for.
        if !unsafe { sys::is_culib_present() } {
            return Err("there is no libcublasLt".to_string());
        }
        // SAFETY: may be called before anything else.
        let version = unsafe { sys::cublasLtGetVersion() };
        if version < OLDEST {
            return Err(format!("libcublasLt is of version {version}, {OLDEST} is the oldest that will do"));
        }
        context.bind().map_err(|error| error.to_string())?;
        let handle = lt::create_handle().map_err(failed)?;
        Ok(Arc::new(Library { context: Arc::clone(context), handle }))
    }

    /// # Errors
    /// A product that the library has nothing for.
    pub fn prepare(self: &Arc<Library>, product: &LibraryProduct) -> Result<Prepared, String> {
        self.context.bind().map_err(|error| error.to_string())?;
        // Where the bias will be, as far as its alignment goes: nothing is read there.
        let bias = product.has_bias.then_some(ALIGNMENT);
        let description = Description::new(product, bias).map_err(failed)?;
        let preference = Preference::new().map_err(failed)?;
        let [first, second, to] = description.layouts;
        // SAFETY: all were made above and live until the call is back.
        let found = unsafe {
            lt::get_matmul_algo_heuristic(self.handle, description.operation, first, second, to, to, preference.0)
        };
        let found = found.map_err(failed)?;
        if found.workspaceSize > MOST_WORKSPACE {
            return Err(format!("cuBLASLt wants {} bytes for a product", found.workspaceSize));
        }
        Ok(Prepared {
            library: Arc::clone(self),
            product: product.clone(),
            algorithm: found.algo,
            workspace_bytes: found.workspaceSize,
        })
    }
}

impl Drop for Library {
    fn drop(&mut self) {
        if self.context.bind().is_ok() {
            // SAFETY: created once and destroyed once; what was prepared holds the library.
            let _ = unsafe { lt::destroy_handle(self.handle) };
        }
    }
}

impl Prepared {
    /// The product of what lies at `addresses`, in the order of [`LibraryProduct::arguments`].
    ///
    /// # Errors
    /// The library has no memory left.
    pub fn bind(&self, addresses: &[u64]) -> Result<Call, ResourceError> {
        let &[a, b, to, workspace, ref more @ ..] = addresses else { unreachable!("four arguments, or more") };
        let (bias, residual) = more.split_at(usize::from(self.product.has_bias));
        let refused = |error| ResourceError::System {
            what: "a product of cuBLASLt",
            message: lt::CublasError::to_string(&error),
        };
        Ok(Call {
            library: Arc::clone(&self.library),
            description: Description::new(&self.product, bias.first().copied()).map_err(refused)?,
            algorithm: self.algorithm,
            alpha: self.product.alpha,
            beta: self.product.beta,
            a,
            b,
            residual: residual.first().copied().unwrap_or(to),
            to,
            workspace,
            workspace_bytes: self.workspace_bytes,
        })
    }
}

impl Call {
    /// Asks for the product, in the stream's order.
    ///
    /// # Errors
    /// What the library says; a lost device is found by who waits.
    pub fn enqueue(&self, stream: &Stream) -> Result<(), RunError> {
        let refused = |message: String| RunError::Resource(ResourceError::System { what: "the GPU", message });
        self.library.context.bind().map_err(|error| refused(error.to_string()))?;
        let [first, second, to] = self.description.layouts;
        let (alpha, beta) = (self.alpha, self.beta);
        // SAFETY: the addresses are of device memory of the layouts' extents, which the caller keeps until the stream is idle; the workspace
        // is as large as the algorithm wants it, and this stream's alone.
        let done = unsafe {
            lt::matmul(
                self.library.handle,
                self.description.operation,
                ptr::from_ref(&alpha).cast(),
                ptr::from_ref(&beta).cast(),
                self.b as *const c_void,
                first,
                self.a as *const c_void,
                second,
                self.residual as *const c_void,
                to,
                self.to as *mut c_void,
                to,
                &self.algorithm,
                self.workspace as *mut c_void,
                self.workspace_bytes,
                stream.raw().cast(),
            )
        };
        done.map_err(|error| refused(failed(error)))
    }
}

fn data_type(element: Element) -> sys::cudaDataType {
    match element {
        Element::F16 => sys::cudaDataType::CUDA_R_16F,
        Element::BF16 => sys::cudaDataType::CUDA_R_16BF,
        _ => sys::cudaDataType::CUDA_R_32F,
    }
}

impl Description {
    fn new(product: &LibraryProduct, bias: Option<u64>) -> Result<Description, lt::CublasError> {
        use sys::{cublasComputeType_t as Compute, cublasLtEpilogue_t as Epilogue};
        let compute = if product.tf32 { Compute::CUBLAS_COMPUTE_32F_FAST_TF32 } else { Compute::CUBLAS_COMPUTE_32F };
        let operation = lt::create_matmul_desc(compute, sys::cudaDataType::CUDA_R_32F)?;
        let mut made = Description { operation, layouts: [ptr::null_mut(); 3] };
        let epilogue = match (product.has_bias, product.function) {
            (false, LibraryFunction::None) => Epilogue::CUBLASLT_EPILOGUE_DEFAULT,
            (false, LibraryFunction::Relu) => Epilogue::CUBLASLT_EPILOGUE_RELU,
            (false, LibraryFunction::GeluTanh) => Epilogue::CUBLASLT_EPILOGUE_GELU,
            (true, LibraryFunction::None) => Epilogue::CUBLASLT_EPILOGUE_BIAS,
            (true, LibraryFunction::Relu) => Epilogue::CUBLASLT_EPILOGUE_RELU_BIAS,
            (true, LibraryFunction::GeluTanh) => Epilogue::CUBLASLT_EPILOGUE_GELU_BIAS,
        };
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        // Our second factor `[k, n]` by rows is `[n, k]` by columns, as it is wanted; `[n, k]` by rows is that transposed. Of the first likewise.
        let is_transposed = [product.b.order == Order::ByK, product.a.order == Order::ByOuter].map(i32::from);
        made.set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &is_transposed[0])?;
        made.set(Attribute::CUBLASLT_MATMUL_DESC_TRANSB, &is_transposed[1])?;
        made.set(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, &(epilogue as u32))?;
        if let Some(bias) = bias {
            made.set(Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias)?;
        }
        let (m, n, k) = (product.m, product.n, product.k);
        let extents = |is_transposed: i32, rows: usize, columns: usize| match is_transposed {
            0 => (rows, columns),
            _ => (columns, rows),
        };
        for (at, (element, (rows, columns), leading, stride)) in [
            (product.element, extents(is_transposed[0], n, k), product.b.leading, product.b.stride),
            (product.element, extents(is_transposed[1], k, m), product.a.leading, product.a.stride),
            (product.result, (n, m), n, n * m),
        ]
        .into_iter()
        .enumerate()
        {
            let layout = lt::create_matrix_layout(data_type(element), rows as u64, columns as u64, leading as i64)?;
            made.layouts[at] = layout;
            if product.count > 1 {
                use sys::cublasLtMatrixLayoutAttribute_t as Attribute;
                let (count, stride) = (product.count as i32, stride as i64);
                set_layout(layout, Attribute::CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count)?;
                set_layout(layout, Attribute::CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &stride)?;
            }
        }
        Ok(made)
    }

    fn set<T>(&self, attribute: sys::cublasLtMatmulDescAttributes_t, value: &T) -> Result<(), lt::CublasError> {
        // SAFETY: made above; the library copies so many bytes.
        unsafe { lt::set_matmul_desc_attribute(self.operation, attribute, ptr::from_ref(value).cast(), size_of::<T>()) }
    }
}

fn set_layout<T>(
    layout: sys::cublasLtMatrixLayout_t,
    attribute: sys::cublasLtMatrixLayoutAttribute_t,
    value: &T,
) -> Result<(), lt::CublasError> {
    // SAFETY: the caller has just made it; the library copies so many bytes.
    unsafe { lt::set_matrix_layout_attribute(layout, attribute, ptr::from_ref(value).cast(), size_of::<T>()) }
}

impl Drop for Description {
    fn drop(&mut self) {
        // SAFETY: made once and destroyed once; the library copies what it needs of them for what is under way.
        unsafe {
            for layout in self.layouts.iter().filter_map(|&layout| NonNull::new(layout)) {
                let _ = lt::destroy_matrix_layout(layout.as_ptr());
            }
            let _ = lt::destroy_matmul_desc(self.operation);
        }
    }
}

struct Preference(sys::cublasLtMatmulPreference_t);

impl Preference {
    fn new() -> Result<Preference, lt::CublasError> {
        let made = Preference(lt::create_matmul_pref()?);
        let attribute = sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        // SAFETY: made above; the library copies so many bytes.
        unsafe {
            lt::set_matmul_pref_attribute(
                made.0,
                attribute,
                ptr::from_ref(&MOST_WORKSPACE).cast(),
                size_of_val(&MOST_WORKSPACE),
            )?;
        }
        Ok(made)
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: made once and destroyed once.
        let _ = unsafe { lt::destroy_matmul_pref(self.0) };
    }
}
