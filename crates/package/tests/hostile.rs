//! Packages as an attacker, or a bad disk, would have them: each is refused with a reason, none panics.

use cutover_graph::{
    Constant, Graph, TensorFact,
    onnx::ImportOptions,
    ops::{MatMul, Softmax, SoftmaxFunction},
};
use cutover_package::{Contents, Golden, Manifest, Package, PackageError, file, write, write_folder};
use cutover_tensor::{DType, Tensor};
use std::{
    fs::{self, File},
    io::Write,
    path::Path,
};
use zip::{CompressionMethod, ZipWriter, write::SimpleFileOptions};

fn model() -> (Graph, Golden) {
    let mut graph = Graph::new("m");
    let weights = Tensor::from_vec([4, 5000], (0..20_000).map(|i| i as f32 / 1e4).collect::<Vec<_>>()).unwrap();
    let w = graph.add_constant("w", Constant::new(weights));
    let x = graph.add_input("x", TensorFact::of_constant_shape(DType::F32, &[1, 4]));
    let node = graph.add_node("product", MatMul { activation: None }.into(), vec![Some(x), Some(w)], vec!["h".into()]);
    let h = graph.node(node.unwrap()).outputs[0];
    let softmax = Softmax { function: SoftmaxFunction::Softmax, axis: -1, coerced: false };
    let node = graph.add_node("softmax", softmax.into(), vec![Some(h)], vec!["y".into()]).unwrap();
    let y = graph.node(node).outputs[0];
    graph.set_outputs(vec![y]);
    let golden = Golden {
        inputs: vec![("x".to_string(), Tensor::from_vec([1, 4], vec![1f32, 2.0, 3.0, 4.0]).unwrap())],
        outputs: vec![("y".to_string(), Tensor::from_vec([1, 5000], vec![2e-4f32; 5000]).unwrap())],
    };
    (graph, golden)
}

fn contents<'a>(graph: &'a Graph, golden: &'a Golden) -> Contents<'a> {
    Contents { graph, manifest: Manifest::of(graph, "m", "v1").unwrap(), golden, profile: None, tokenizer: None }
}

/// Opens all that there is to open.
fn open(path: &Path) -> Result<(Graph, Golden), PackageError> {
    let package = Package::open(path)?;
    Ok((package.graph(&ImportOptions::default())?, package.golden()?))
}

fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let (graph, golden) = model();
    write_folder(&contents(&graph, &golden), folder.path()).unwrap();
    folder
}

/// splitmix64.
fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb) >> 31
}

#[test]
fn a_package_comes_back_as_it_was_written() {
    let home = tempfile::tempdir().unwrap();
    let (graph, golden) = model();
    let path = home.path().join("m.cutover");
    let manifest = write(&contents(&graph, &golden), &path).unwrap();
    assert_eq!(manifest.tensors.len(), 1);
    assert!(Package::is_one(&path));
    let (read, read_golden) = open(&path).unwrap();
    assert_eq!(read_golden, golden);
    assert_eq!(Manifest::of(&read, "m", "v1").unwrap().outputs, manifest.outputs);
    assert_eq!(fs::read_dir(home.path()).unwrap().count(), 1, "nothing beside the package is left");
    // Weights start on a page of the archive, so that it can be mapped where it lies.
    let bytes = fs::read(&path).unwrap();
    let weights = fs::read(folder().path().join(file::WEIGHTS)).unwrap();
    let at = bytes.windows(weights.len()).position(|w| w == weights).unwrap();
    assert_eq!(at % 4096, 0);
}

#[test]
fn a_cut_archive_is_refused_wherever_it_is_cut() {
    let home = tempfile::tempdir().unwrap();
    let (graph, golden) = model();
    let path = home.path().join("m.cutover");
    write(&contents(&graph, &golden), &path).unwrap();
    let bytes = fs::read(&path).unwrap();
    let ends = (0..bytes.len()).step_by(bytes.len() / 60).chain(bytes.len() - 60..bytes.len());
    for end in ends {
        fs::write(&path, &bytes[..end]).unwrap();
        assert!(open(&path).is_err(), "{end} of {} bytes", bytes.len());
    }
}

#[test]
fn a_changed_byte_is_found_or_harms_nothing() {
    let home = tempfile::tempdir().unwrap();
    let (graph, golden) = model();
    let path = home.path().join("m.cutover");
    write(&contents(&graph, &golden), &path).unwrap();
    let (bytes, mut seed, mut refused) = (fs::read(&path).unwrap(), 5u64, 0);
    let factor: usize = std::env::var("CUTOVER_SOAK").ok().and_then(|v| v.parse().ok()).unwrap_or(1);
    // Half of the changes go to the last bytes, where the directory is.
    for round in 0..400 * factor {
        let mut changed = bytes.clone();
        let span = if round % 2 == 0 { bytes.len() } else { 400 };
        let at = bytes.len() - 1 - random(&mut seed) as usize % span;
        changed[at] ^= 1 << (random(&mut seed) % 8);
        fs::write(&path, changed).unwrap();
        match open(&path) {
            Err(_) => refused += 1,
            // Padding, times and permissions mean nothing here.
            Ok((_, read)) => assert_eq!(read, golden, "byte {at}"),
        }
    }
    assert!(refused > 200 * factor, "{refused} refused");
}

/// An archive of these entries.
fn archive(path: &Path, entries: &[(&str, Vec<u8>, CompressionMethod)]) {
    let mut zip = ZipWriter::new(File::create(path).unwrap());
    for (name, bytes, method) in entries {
        zip.start_file(*name, SimpleFileOptions::default().compression_method(*method)).unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.finish().unwrap();
}

/// Replaces the `n`-th occurrence of `from`, which must be of the same length.
fn replace(bytes: &mut [u8], from: &[u8], to: &[u8], n: usize) {
    let at = bytes.windows(from.len()).enumerate().filter(|(_, w)| *w == from).nth(n).unwrap().0;
    bytes[at..at + to.len()].copy_from_slice(to);
}

#[test]
fn archives_that_say_two_things_are_refused() {
    let source = folder();
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("m.cutover");
    let stored = CompressionMethod::Stored;
    let read = |name: &str| fs::read(source.path().join(name)).unwrap();
    let there = |name: &&&str| source.path().join(name).exists();
    let whole = || file::ALL.iter().filter(there).map(|name| (*name, read(name), stored)).collect::<Vec<_>>();
    archive(&path, &whole());
    open(&path).unwrap();
    let good = fs::read(&path).unwrap();
    let refused = |case: &str, expected: &str| {
        let error = open(&path).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains(expected), "{case}: {error}");
    };

    for (name, expected) in
        [("../evil", "'../evil'"), ("/etc/evil", "'/etc/evil'"), ("a/model.onnx", "a/model.onnx"), ("x", "'x'")]
    {
        let mut entries = whole();
        entries.push((name, b"x".to_vec(), stored));
        archive(&path, &entries);
        refused(name, expected);
    }
    assert!(!home.path().parent().unwrap().join("evil").exists());

    // Twice the same name: other readers would take the other one.
    let mut entries = whole();
    entries.push(("modex.onnx", b"other".to_vec(), stored));
    archive(&path, &entries);
    let mut bytes = fs::read(&path).unwrap();
    for occurrence in [0, 0] {
        replace(&mut bytes, b"modex.onnx", b"model.onnx", occurrence);
    }
    fs::write(&path, bytes).unwrap();
    refused("a name twice", "");

    // The header before the bytes names another file than the directory.
    let mut bytes = good.clone();
    // After the manifest, which names it too.
    replace(&mut bytes, b"model.onnx", b"golden.onx", 1);
    fs::write(&path, bytes).unwrap();
    refused("disagreeing names", "names 'golden.onx'");

    // Compressed, in the eyes of either header: what would unpack to more than it is.
    for (header, method_at) in [(&b"PK\x01\x02"[..], 10), (&b"PK\x03\x04"[..], 8)] {
        let mut bytes = good.clone();
        let at = bytes.windows(4).position(|w| w == header).unwrap() + method_at;
        bytes[at] = 8;
        fs::write(&path, bytes).unwrap();
        refused("compressed", "");
    }

    // An entry without a manifest, and one that is missing.
    for missing in file::ALL.iter().filter(there) {
        let entries: Vec<_> = whole().into_iter().filter(|(name, ..)| name != missing).collect();
        archive(&path, &entries);
        refused(missing, missing);
    }

    // Sizes in one of the two places are raised.
    let size = (read(file::WEIGHTS).len() as u32).to_le_bytes();
    let lie = (read(file::WEIGHTS).len() as u32 + 1_000_000_000).to_le_bytes();
    for occurrence in 0..4 {
        let mut bytes = good.clone();
        replace(&mut bytes, &size, &lie, occurrence);
        fs::write(&path, bytes).unwrap();
        refused("a size raised", "");
    }
}

#[test]
fn manifests_that_lie_are_refused() {
    let change = |edit: &dyn Fn(&mut serde_json::Value)| {
        let folder = folder();
        let path = folder.path().join(file::MANIFEST);
        let mut manifest: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        edit(&mut manifest);
        fs::write(&path, manifest.to_string()).unwrap();
        open(folder.path()).map(|_| ()).unwrap_err().to_string()
    };
    type Edit = fn(&mut serde_json::Value);
    let cases: [(Edit, &str); 16] = [
        (|m| m["format"] = "2.0".into(), "format is '2.0'"),
        (|m| *m = serde_json::json!([]), "format is ''"),
        (|m| m["name"] = "../m".into(), "'../m'"),
        (|m| m["version"] = "".into(), "the version ''"),
        (|m| m["version"] = "v".repeat(10_000).into(), "1 to 128"),
        (|m| m["files"]["../x"] = m["files"]["model.onnx"].clone(), "'../x'"),
        (|m| drop(m["files"].as_object_mut().unwrap().remove("golden.safetensors")), "golden.safetensors"),
        (|m| m["files"]["model.onnx"]["bytes"] = u64::MAX.into(), "the manifest says 18446744073709551615"),
        (|m| m["files"]["model.onnx"]["blake3"] = "00".into(), "has digest"),
        (|m| m["files"]["weights.safetensors"]["bytes"] = (-1).into(), "manifest.json"),
        (|m| m["tensors"]["w"] = "00".into(), "tensor 'w'"),
        (|m| m["tensors"] = serde_json::json!({}), "does not list tensor 'w'"),
        (|m| m["tensors"]["other"] = m["tensors"]["w"].clone(), "lists tensor 'other'"),
        (|m| m["inputs"][0]["dtype"] = "i64".into(), "inputs or outputs"),
        (|m| m["golden"]["rtol"] = (-1.0).into(), "tolerances"),
        (|m| m["gates"] = serde_json::json!({ "alpha": 0.0 }), "alpha"),
    ];
    for (edit, expected) in cases {
        let error = change(&edit);
        assert!(error.contains(expected), "{error}, expected {expected}");
    }
    let unknown_gate = change(&|m| m["gates"] = serde_json::json!({ "acuracy_drop_max": 0.5 }));
    assert!(unknown_gate.contains("acuracy_drop_max"), "a gate misspelt is not a gate: {unknown_gate}");
}

#[test]
fn golden_files_that_lie_are_refused() {
    let (_, golden) = model();
    let bytes = golden.encode();
    assert_eq!(Golden::decode(&bytes).unwrap(), golden);
    for end in [0, 4, 8, 20, bytes.len() / 2, bytes.len() - 1] {
        assert!(Golden::decode(&bytes[..end]).is_err(), "{end} bytes");
    }
    let mut huge = bytes.clone();
    huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    assert!(Golden::decode(&huge).is_err());
}

#[test]
fn golden_answers_are_compared_element_by_element() {
    let golden = |value: f32| Golden {
        outputs: vec![("y".to_string(), Tensor::from_vec([2], vec![1.0, value]).unwrap())],
        ..Golden::default()
    };
    let agrees = |expected: f32, actual: f32| golden(expected).compare(&golden(actual).outputs, Default::default());
    for (expected, actual, same) in [
        (2.0, 2.0, true),
        (2.0, 2.001, true),
        (2.0, 2.01, false),
        (f32::INFINITY, f32::INFINITY, true),
        (f32::INFINITY, 5.0, false),
        (f32::INFINITY, f32::NEG_INFINITY, false),
        (f32::NAN, f32::NAN, true),
        (2.0, f32::NAN, false),
        (f32::NAN, 2.0, false),
    ] {
        let result = agrees(expected, actual);
        assert_eq!(result.is_ok(), same, "{actual} for {expected}: {result:?}");
        assert!(same || result.unwrap_err().contains("'y', element 1"));
    }
    assert!(golden(1.0).compare(&[], Default::default()).unwrap_err().contains("missing"));
}
