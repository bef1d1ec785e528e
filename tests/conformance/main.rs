//! Small models as exporters write them, on every backend, against the outputs that ONNX Runtime gave (see `make_models.py`).

use cutover::{
    Device, DeviceOptions, Model, OpenOptions, Tensor, TensorView,
    graph::{
        onnx::{ImportOptions, Weights, export, import},
        passes::PassOptions,
    },
};
use cutover_cli::tensors;
use std::path::{Path, PathBuf};

const MODELS: [&str; 6] = ["mobile", "segmentation", "transformer", "recurrent", "quantized", "traced"];

fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("conformance/models").join(name)
}

/// Largest difference from what is stored, over all outputs.
fn check(name: &str, model: &Model, device: Device, options: &DeviceOptions) {
    let mut session = model.compile_with(device, options).unwrap().session().unwrap();
    let inputs = tensors::read(&file(&format!("{name}.in.npz")), None).unwrap();
    let expected = tensors::read(&file(&format!("{name}.out.npz")), None).unwrap();
    let views: Vec<(&str, TensorView<'_>)> = inputs.iter().map(|(n, t)| (n.as_str(), t.view())).collect();
    // Twice: the second run finds its memory used.
    for _ in 0..2 {
        let answers = session.run(views.clone()).unwrap();
        for (output, expected) in &expected {
            let actual: &Tensor = answers.get(output).unwrap();
            assert_eq!(actual.shape(), expected.shape(), "{name}, {output}");
            let pairs = actual.to_vec::<f32>().unwrap().into_iter().zip(expected.to_vec::<f32>().unwrap());
            for (at, (a, e)) in pairs.enumerate() {
                assert!(
                    (a - e).abs() <= 1e-4 + 1e-3 * e.abs(),
                    "{name} on {device:?}, {output}[{at}]: {a}, expected {e}"
                );
            }
        }
    }
}

#[test]
fn models_agree_on_every_backend_instruction_set_and_number_of_threads() {
    for name in MODELS {
        let model = Model::open(file(&format!("{name}.onnx"))).unwrap();
        check(name, &model, Device::Reference, &DeviceOptions::default());
        for isa in ["scalar", "avx2", "avx512"] {
            for threads in [1, 3] {
                let options =
                    DeviceOptions { threads: Some(threads), isa: Some(isa.to_string()), ..DeviceOptions::default() };
                // A rung that this machine lacks is refused by name.
                match Device::Cpu.backend(&options) {
                    Ok(_) => check(name, &model, Device::Cpu, &options),
                    Err(error) => assert!(error.to_string().contains(isa), "{error}"),
                }
            }
        }
    }
}

#[test]
fn every_prefix_of_the_rewriting_gives_the_same_answers() {
    for name in MODELS {
        let steps = Model::open(file(&format!("{name}.onnx"))).unwrap().passes().steps.len();
        for stop_after in (0..=steps).step_by((steps / 6).max(1)) {
            let passes = PassOptions { stop_after: Some(stop_after), ..PassOptions::default() };
            let options = OpenOptions { passes, ..OpenOptions::default() };
            let model = Model::open_with(file(&format!("{name}.onnx")), &options).unwrap();
            check(name, &model, Device::Reference, &DeviceOptions::default());
        }
    }
}

#[test]
fn what_is_written_out_gives_the_same_answers() {
    let folder = tempfile::tempdir().unwrap();
    for name in MODELS {
        let graph = import(&file(&format!("{name}.onnx")), &ImportOptions::default()).unwrap();
        let written = folder.path().join(format!("{name}.onnx"));
        export(&graph, &written, &Weights::Safetensors { file_name: format!("{name}.safetensors") }).unwrap();
        let model = Model::open(written).unwrap();
        for device in [Device::Reference, Device::Cpu] {
            check(name, &model, device, &DeviceOptions::default());
        }
    }
}
