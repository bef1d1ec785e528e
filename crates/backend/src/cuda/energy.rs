//! The energy that NVIDIA's GPUs count, through the management library that comes with their driver.
//!
//! Nothing else of that library is asked for, so it is looked for by name and called by the five functions below.
#![allow(unsafe_code)] // a foreign interface

use libloading::{Library, Symbol};
use std::{
    ffi::{CStr, c_char, c_int, c_uint, c_void},
    ptr,
};

/// As the driver installs it; the name with the number is there without its development files.
const NAMES: &[&str] = if cfg!(windows) { &["nvml.dll"] } else { &["libnvidia-ml.so.1", "libnvidia-ml.so"] };

/// Of a name, zero included.
const NAME_BYTES: usize = 96;

type Device = *mut c_void;

/// The counters of all GPUs of one name, from when they were asked for: what others do on them is in it.
pub struct GpuEnergy {
    library: Library,
    /// And what each had counted at the begin, in mJ.
    devices: Vec<(Device, u64)>,
}

impl GpuEnergy {
    /// # Errors
    /// In words: no library, one that does not start, no GPU of that name, or one that counts no energy (those before Volta).
    pub fn start(name: &str) -> Result<GpuEnergy, String> {
        // SAFETY: loading NVIDIA's library runs its initialisers, which is what whoever asks for the GPU's energy asks for.
        let mut found = NAMES.iter().filter_map(|name| unsafe { Library::new(*name) }.ok());
        let library = found.next().ok_or("there is no NVML, which comes with NVIDIA's driver")?;
        call(&library, c"nvmlInit_v2", |init: Symbol<'_, unsafe extern "C" fn() -> c_int>| {
            // SAFETY: takes nothing; ended once, in `drop`.
            unsafe { init() }
        })?;
        let mut energy = GpuEnergy { library, devices: Vec::new() };
        for device in energy.devices_of(name)? {
            let counted = energy.counted(device)?;
            energy.devices.push((device, counted));
        }
        if energy.devices.is_empty() {
            return Err(format!("NVML sees no '{name}'"));
        }
        Ok(energy)
    }

    /// Joules since the start; `None` where a counter can't be read any more.
    pub fn joules(&self) -> Option<f64> {
        let used = self.devices.iter().map(|&(device, start)| {
            let now = self.counted(device).ok()?;
            Some(now.saturating_sub(start) as f64 / 1e3)
        });
        used.sum()
    }

    fn devices_of(&self, name: &str) -> Result<Vec<Device>, String> {
        let mut count: c_uint = 0;
        call(
            &self.library,
            c"nvmlDeviceGetCount_v2",
            |get: Symbol<'_, unsafe extern "C" fn(*mut c_uint) -> c_int>| {
                // SAFETY: writes one number.
                unsafe { get(&mut count) }
            },
        )?;
        let mut devices = Vec::new();
        for index in 0..count {
            let mut device: Device = ptr::null_mut();
            type Get = unsafe extern "C" fn(c_uint, *mut Device) -> c_int;
            call(&self.library, c"nvmlDeviceGetHandleByIndex_v2", |get: Symbol<'_, Get>| {
                // SAFETY: writes one handle, which lives as long as the library is started.
                unsafe { get(index, &mut device) }
            })?;
            let mut of = [0 as c_char; NAME_BYTES];
            type Name = unsafe extern "C" fn(Device, *mut c_char, c_uint) -> c_int;
            call(&self.library, c"nvmlDeviceGetName", |get: Symbol<'_, Name>| {
                // SAFETY: writes at most as many bytes as it is told, a zero among them.
                unsafe { get(device, of.as_mut_ptr(), NAME_BYTES as c_uint - 1) }
            })?;
            // SAFETY: the last byte is zero whatever was written.
            let of = unsafe { CStr::from_ptr(of.as_ptr()) };
            if of.to_bytes() == name.as_bytes() {
                devices.push(device);
            }
        }
        Ok(devices)
    }

    fn counted(&self, device: Device) -> Result<u64, String> {
        let mut millijoules: u64 = 0;
        type Get = unsafe extern "C" fn(Device, *mut u64) -> c_int;
        call(&self.library, c"nvmlDeviceGetTotalEnergyConsumption", |get: Symbol<'_, Get>| {
            // SAFETY: of a device that the library has given; writes one number.
            unsafe { get(device, &mut millijoules) }
        })?;
        Ok(millijoules)
    }
}

impl Drop for GpuEnergy {
    fn drop(&mut self) {
        let _ = call(&self.library, c"nvmlShutdown", |end: Symbol<'_, unsafe extern "C" fn() -> c_int>| {
            // SAFETY: started once and ended once.
            unsafe { end() }
        });
    }
}

/// Calls the library's function `name`, whose type the caller states as NVIDIA's header does.
fn call<F>(library: &Library, name: &CStr, ask: impl FnOnce(Symbol<'_, F>) -> c_int) -> Result<(), String> {
    // SAFETY: of the type that the caller states.
    let function = unsafe { library.get::<F>(name.to_bytes_with_nul()) };
    match ask(function.map_err(|error| format!("NVML: {error}"))?) {
        0 => Ok(()),
        error => Err(format!("NVML: {} gives error {error}", name.to_string_lossy())),
    }
}
