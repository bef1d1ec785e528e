//! Whole models: the digits of this repository, and those whose paths `CUTOVER_BENCH_MODELS` lists, separated by colons.

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use cutover::{Device, DeviceOptions, Model, Tensor};
use std::path::{Path, PathBuf};

fn digits(criterion: &mut Criterion) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace").join("models/digits");
    let mut group = criterion.benchmark_group("digits");
    for version in ["v1", "v2"] {
        let path = root.join(version).join("model.onnx");
        group.bench_function(BenchmarkId::new("open and compile", version), |bencher| {
            bencher
                .iter(|| Model::open(&path).and_then(|m| m.compile(Device::Cpu)).expect("a model of this repository"));
        });
        for batch in [1, 32] {
            let image = Tensor::from_vec([batch, 1, 8, 8], vec![0.5f32; batch * 64]).expect("64 pixels an image");
            let mut session = session(&path);
            group.bench_function(BenchmarkId::new(format!("run, batch {batch}"), version), |bencher| {
                bencher.iter(|| session.run([("image", image.view())]).expect("a valid image"));
            });
        }
    }
}

fn others(criterion: &mut Criterion) {
    let paths = std::env::var("CUTOVER_BENCH_MODELS").unwrap_or_default();
    for path in paths.split(':').filter(|p| !p.is_empty()).map(PathBuf::from) {
        let name = path.file_stem().and_then(|s| s.to_str()).unwrap_or("model").to_string();
        criterion.bench_function(&format!("open and compile {name}"), |bencher| {
            bencher.iter(|| Model::open(&path).and_then(|m| m.compile(Device::Cpu)).expect("a valid model"));
        });
    }
}

fn session(path: &Path) -> cutover::Session {
    let options = DeviceOptions { threads: Some(1), ..DeviceOptions::default() };
    let compiled = Model::open(path).and_then(|m| m.compile_with(Device::Cpu, &options));
    compiled.and_then(|c| c.session()).expect("a model of this repository")
}

criterion_group!(models, digits, others);
criterion_main!(models);
