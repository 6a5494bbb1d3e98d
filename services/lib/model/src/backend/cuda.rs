//! The CUDA devices of this host, by cudarc: libcuda is looked for at run time, so one build runs with and without it.
use crate::{Error, Result};
use cudarc::driver::{CudaContext, DriverError};
use std::panic::catch_unwind;

/// A CUDA device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CudaDevice {
    /// Its number, from 0.
    pub ordinal: usize,
    /// As the driver calls it.
    pub name: String,
    /// Compute capability.
    pub capability: (i32, i32),
    /// Bytes of memory that are free.
    pub free_bytes: usize,
    /// Bytes of memory in all.
    pub total_bytes: usize,
}

/// All devices.
///
/// # Errors
/// `Backend` where libcuda is missing, the driver refuses, or there is no device.
pub fn devices() -> Result<Vec<CudaDevice>> {
    let refused = |reason: String| Error::Backend { backend: "candle", reason };
    // cudarc panics where the library is missing
    let count = catch_unwind(CudaContext::device_count)
        .map_err(|_| refused("libcuda is not on this host: install NVIDIA's driver or use --backend native".into()))?;
    let count = count.map_err(|error| refused(format!("count the CUDA devices: {error:?}")))?;
    let devices = (0..count.unsigned_abs() as usize).map(|ordinal| {
        let look = || -> Result<CudaDevice, DriverError> {
            let context = CudaContext::new(ordinal)?;
            let (free_bytes, total_bytes) = context.mem_get_info()?;
            let (name, capability) = (context.name()?, context.compute_capability()?);
            Ok(CudaDevice { ordinal, name, capability, free_bytes, total_bytes })
        };
        look().map_err(|error| refused(format!("look at CUDA device {ordinal}: {error:?}")))
    });
    let devices = devices.collect::<Result<Vec<_>>>()?;
    match devices.is_empty() {
        true => Err(refused("no CUDA device: use --backend native, or a build without `cuda`".into())),
        false => Ok(devices),
    }
}

/// The device with the most free memory.
///
/// # Errors
/// As [`devices`].
pub fn roomiest() -> Result<CudaDevice> {
    let roomiest = devices()?.into_iter().max_by_key(|device| (device.free_bytes, std::cmp::Reverse(device.ordinal)));
    Ok(roomiest.expect("`devices` gives at least one"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_without_devices_says_so_and_one_with_devices_lists_them() {
        match devices() {
            Ok(devices) => {
                assert!(devices.iter().enumerate().all(|(i, device)| device.ordinal == i && device.total_bytes > 0));
                assert!(devices.contains(&roomiest().unwrap()) || !devices.is_empty());
            }
            Err(error) => assert!(error.to_string().contains("--backend native"), "{error}"),
        }
    }
}
