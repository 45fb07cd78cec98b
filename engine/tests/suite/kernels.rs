//! Every kernel by itself, in every variant that a device can run, against float64.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use engine::kernels::check;

use crate::devices::devices;

#[test]
fn every_kernel_computes_what_its_reference_does() {
    let mut wrong = Vec::new();
    for device in devices() {
        let client = device.client();
        let on_buffers = client.iter().flat_map(check::all);
        for (kernel, checked) in check::of_tensors(device.burn()).chain(on_buffers) {
            let name = format!("{kernel} on {}", device.backend());
            match checked {
                Err(error) => wrong.push(format!("{name}: {error}")),
                Ok(found) if found.is_empty() => wrong.push(format!("{name}: nothing was compared")),
                Ok(found) => wrong.extend(found.iter().filter(|found| !found.passed()).map(|found| {
                    format!("{name}, {}: {:e}, needed {:e} at most", found.case, found.error, found.bound)
                })),
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Files that launch something; what launches in `mxfp4_dot` is itself a check, of a device's f16.
#[test]
fn no_kernel_goes_unchecked() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/kernels");
    let files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let files = files.filter(|path| path.extension().is_some_and(|extension| extension == "rs"));
    let kernels =
        files.filter(|path| fs::read_to_string(path).unwrap().contains("#[cube(launch_unchecked)]"));
    let mut kernels: BTreeSet<String> =
        kernels.map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned()).collect();
    assert!(kernels.remove("mxfp4_dot"));
    kernels.insert("product".into());
    assert_eq!(check::names().map(str::to_owned).collect::<BTreeSet<_>>(), kernels);
}
