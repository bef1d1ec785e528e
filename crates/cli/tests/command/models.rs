//! Commands on one model: inspect, run, verify, bench, convert, unpack.

use crate::{Folder, arguments, conformance, cutover, digits, tensors};
use cutover::{DType, Tensor};
use cutover_cli::tensors::{Named, write};
use std::path::Path;

const CONFORMANCE: [&str; 4] = ["mobile", "recurrent", "segmentation", "transformer"];

/// 64 pixels of one image, and another: `[2, 1, 8, 8]`.
fn images() -> Tensor {
    Tensor::from_vec([2, 1, 8, 8], (0..128).map(|i| (i * 7 % 17) as f32 / 64.0).collect()).unwrap()
}

fn save(path: &str, tensors: &[(&str, &Tensor)]) {
    let named: Named = tensors.iter().map(|(name, tensor)| (name.to_string(), (*tensor).clone())).collect();
    write(Path::new(path), &named).unwrap();
}

/// The images in a file, and what digits answers to them in another.
fn asked_and_answered(folder: &Folder) -> (String, String) {
    let (inputs, outputs) = (folder.path("in.npz"), folder.path("out.npz"));
    save(&inputs, &[("image", &images())]);
    cutover(arguments!["run", digits("v1"), "--inputs", &inputs, "--outputs", &outputs]).done();
    (inputs, outputs)
}

#[test]
fn inspect_shows_signature_operators_and_placement() {
    let document = cutover(arguments!["inspect", digits("v1"), "--json", "--nodes", "--passes"]).done().json();
    assert_eq!(document["inputs"][0]["name"], "image");
    assert_eq!(document["inputs"][0]["fact"], "f32[N, 1, 8, 8]");
    assert_eq!(document["outputs"][0]["fact"], "f32[N, 10]");
    assert!(document["ops"]["Conv"].as_u64().unwrap() >= 1 && document["parameters"].as_u64().unwrap() > 1000);
    let backends: Vec<&str> =
        document["backends"].as_array().unwrap().iter().map(|b| b["backend"].as_str().unwrap()).collect();
    assert_eq!(backends, ["cpu", "reference"]);
    assert!(!document["backends"][0]["nodes"].as_array().unwrap().is_empty());
    cutover(arguments!["inspect", digits("v1"), "--nodes", "--passes"])
        .done()
        .says(&["image", "Conv", "kernel", "cpu"]);
    for model in CONFORMANCE {
        cutover(arguments!["inspect", conformance(&format!("{model}.onnx")), "--json"]).done().json();
    }
}

#[test]
fn run_takes_and_writes_every_format() {
    let folder = Folder::new();
    let (_, expected) = asked_and_answered(&folder);
    let expected = tensors(&expected);
    for from in ["npz", "npy", "safetensors", "json"] {
        let inputs = folder.path(&format!("in.{from}"));
        save(&inputs, &[("image", &images())]);
        for to in ["npz", "npy", "safetensors", "json"] {
            let outputs = folder.path(&format!("out.{to}"));
            let document =
                cutover(arguments!["run", digits("v1"), "--inputs", &inputs, "--outputs", &outputs, "--json"])
                    .done()
                    .json();
            assert_eq!(document["outputs"], outputs.as_str());
            let written = cutover_cli::tensors::read(Path::new(&outputs), Some("probabilities")).unwrap();
            assert_eq!(written, expected, "{from} to {to}");
        }
    }
    let inputs = folder.path("in.npz");
    let printed = cutover(arguments!["run", digits("v1"), "--inputs", &inputs, "--json"]).done().json();
    assert_eq!(printed["probabilities"]["shape"], serde_json::json!([2, 10]));
    assert_eq!(printed["probabilities"]["data"].as_array().unwrap().len(), 20);
    cutover(arguments!["run", digits("v1"), "--inputs", &inputs]).done().says(&["probabilities: "]);
    let rows = [[0.5; 8]; 8];
    let nested = serde_json::json!({ "image": [[rows]] }).to_string();
    let nested = folder.write("nested.json", nested);
    cutover(arguments!["run", digits("v1"), "--inputs", nested]).done();
}

#[test]
fn run_names_the_input_that_does_not_fit() {
    let folder = Folder::new();
    let flat = Tensor::from_vec([1, 64], vec![0f32; 64]).unwrap();
    let wide = Tensor::zeros(DType::F64, [1, 1, 8, 8]).unwrap();
    let scalar = Tensor::scalar(1f32);
    let cases: &[(&str, &[(&str, &Tensor)], &[&str])] = &[
        ("shape", &[("image", &flat)], &["'image'", "f32[N, 1, 8, 8]", "f32[1, 64]"]),
        ("type", &[("image", &wide)], &["'image'", "f32[N, 1, 8, 8]", "f64[1, 1, 8, 8]"]),
        ("rank", &[("image", &scalar)], &["'image'", "f32[N, 1, 8, 8]", "f32[]"]),
        ("name", &[("picture", &images())], &["'picture'", "image"]),
        ("extra", &[("image", &images()), ("more", &flat)], &["'more'", "image"]),
        ("none", &[], &["'image'", "f32[N, 1, 8, 8]"]),
    ];
    for (name, held, parts) in cases {
        let inputs = folder.path(&format!("{name}.npz"));
        save(&inputs, held);
        cutover(arguments!["run", digits("v1"), "--inputs", &inputs]).refuses(parts);
        cutover(arguments!["verify", digits("v1"), "--inputs", &inputs, "--expect", &inputs]).refuses(parts);
    }
    let inputs = folder.path("one.npy");
    save(&inputs, &[("x", &images())]);
    cutover(arguments!["run", conformance("recurrent.onnx"), "--inputs", &inputs]).refuses(&["one tensor", ".npz"]);
    let (inputs, _) = asked_and_answered(&folder);
    let outputs = folder.path("out.txt");
    cutover(arguments!["run", digits("v1"), "--inputs", &inputs, "--outputs", &outputs])
        .refuses(&["out.txt", ".safetensors"]);
    let outputs = folder.path("missing/out.npz");
    cutover(arguments!["run", digits("v1"), "--inputs", inputs, "--outputs", outputs]).refuses(&["missing/out.npz"]);
}

#[test]
fn verify_agrees_with_what_other_runtimes_answered() {
    for model in CONFORMANCE {
        for backend in ["cpu", "reference"] {
            let of = |ending: &str| conformance(&format!("{model}.{ending}"));
            let document = cutover(arguments![
                "verify",
                of("onnx"),
                "--inputs",
                of("in.npz"),
                "--expect",
                of("out.npz"),
                "--backend",
                backend,
                "--json",
            ])
            .done()
            .json();
            assert_eq!(document["agrees"], true, "{model} on {backend}: {document}");
        }
    }
}

#[test]
fn verify_says_no_where_outputs_disagree() {
    let folder = Folder::new();
    let (inputs, expect) = asked_and_answered(&folder);
    let (_, right) = tensors(&expect).remove(0);
    let mut values = right.to_vec::<f32>().unwrap();
    values[13] += 0.01;
    let close = Tensor::from_vec([2, 10], values.clone()).unwrap();
    values[13] = f32::NAN;
    let not_a_number = Tensor::from_vec([2, 10], values.clone()).unwrap();
    values = right.to_vec::<f32>().unwrap();
    values[13] = f32::INFINITY;
    let infinite = Tensor::from_vec([2, 10], values).unwrap();
    let reshaped = Tensor::from_vec([20], right.to_vec::<f32>().unwrap()).unwrap();
    let cases: &[(&Tensor, &[&str], i32)] = &[
        (&right, &[], 0),
        (&right, &["--rtol", "0", "--atol", "0"], 0),
        (&close, &[], 1),
        (&close, &["--atol", "0.02"], 0),
        (&close, &["--sqnr", "30"], 0),
        (&close, &["--sqnr", "90"], 1),
        (&not_a_number, &["--atol", "1e9", "--rtol", "1e9"], 1),
        (&not_a_number, &["--sqnr", "1"], 1),
        (&infinite, &[], 1),
        (&infinite, &["--sqnr", "1"], 1),
        (&right, &["--precision", "bf16"], 0),
        (&right, &["--precision", "f16"], 0),
        (&right, &["--precision", "bf16", "--rtol", "1e-6", "--atol", "1e-6"], 1),
        (&right, &["--precision", "bf16", "--sqnr", "90"], 1),
        (&reshaped, &[], 1),
        (&right, &["--rtol", "-1"], 2),
        (&right, &["--sqnr", "nan"], 2),
    ];
    for (expected, options, code) in cases {
        let path = folder.path("expect.npz");
        save(&path, &[("probabilities", expected)]);
        let line = arguments!["verify", digits("v1"), "--inputs", &inputs, "--expect", &path, "--json"];
        let line: Vec<&str> = line.iter().map(String::as_str).chain(options.iter().copied()).collect();
        let outcome = cutover(&line).exits(*code);
        if *code < 2 {
            assert_eq!(outcome.json()["agrees"], *code == 0, "{outcome:#?}");
        }
    }
    let path = folder.path("expect.npz");
    save(&path, &[("probabilities", &close)]);
    let document =
        cutover(arguments!["verify", digits("v1"), "--inputs", &inputs, "--expect", &path, "--json"]).exits(1).json();
    assert_eq!(document["outputs"][0]["absolute_error_at"], serde_json::json!([1, 3]));
    assert!((document["outputs"][0]["absolute_error_max"].as_f64().unwrap() - 0.01).abs() < 1e-6);
    cutover(arguments!["verify", digits("v1"), "--inputs", &inputs, "--expect", &path]).exits(1).says(&["NO", "SQNR"]);
    // What was rounded is never silent: the loss is there, and by what it was judged.
    save(&path, &[("probabilities", &right)]);
    let line = arguments!["verify", digits("v1"), "--inputs", &inputs, "--expect", &path, "--precision", "bf16"];
    cutover(line).done().says(&["yes", "SQNR of at least 25 dB", "precision bf16"]);
    let line: Vec<&str> = line.iter().map(String::as_str).chain(["--json"]).collect();
    let document = cutover(&line).done().json();
    let loss = document["outputs"][0]["sqnr_db"].as_f64().unwrap();
    assert!((25.0..70.0).contains(&loss), "{document}");
    save(&path, &[("probability", &right)]);
    cutover(arguments!["verify", digits("v1"), "--inputs", &inputs, "--expect", &path])
        .refuses(&["'probability'", "probabilities"]);
}

#[test]
fn bench_measures_and_says_what_it_assumed() {
    let document =
        cutover(arguments!["bench", digits("v1"), "--seconds", "0.05", "--threads", "1", "--json"]).done().json();
    for key in ["load_ms", "first_ms", "runs", "peak_rss_bytes"] {
        assert!(document[key].as_f64().is_some_and(|v| v > 0.0), "{key} in {document}");
    }
    assert_eq!((&document["backend"], &document["precision"]), (&"cpu".into(), &"f32".into()));
    assert_eq!((&document["threads"], &document["model"]), (&1.into(), &digits("v1").into()));
    let latency = ["min", "median", "p90", "p99"].map(|k| document["latency_ms"][k].as_f64().unwrap());
    assert!(latency.is_sorted() && latency[0] > 0.0 && document["latency_ms"]["mean"].as_f64().unwrap() >= latency[0]);
    assert_eq!(document["assumed"], serde_json::json!({ "N": 1 }));

    let assumed = [
        ("mobile", serde_json::json!({ "N": 1, "H": 224, "W": 224 })),
        ("segmentation", serde_json::json!({ "N": 1, "H": 224, "W": 224 })),
        ("recurrent", serde_json::json!({ "N": 1, "T": 32 })),
        ("transformer", serde_json::json!({ "N": 1, "S": 32 })),
    ];
    for (model, assumed) in assumed {
        let model = conformance(&format!("{model}.onnx"));
        let document = cutover(arguments!["bench", model, "--seconds", "0.01", "--json"]).done().json();
        assert_eq!(document["assumed"], assumed);
    }
    // Its vocabulary ends at 50: integers below 1000 are no tokens of it.
    cutover(arguments!["bench", conformance("transformer.onnx"), "--seconds", "0.01"]).done().says(&[
        "assumed N = 1, S = 32",
        "--shape tokens=NxS",
        "integers are 0",
    ]);
}

#[test]
fn bench_takes_shapes_and_profiles() {
    let line = arguments![
        "bench",
        conformance("recurrent.onnx"),
        "--seconds",
        "0.01",
        "--shape",
        "signal=3x4x20",
        "--profile",
        "--json",
    ];
    let document = cutover(line).done().json();
    assert_eq!(document["inputs"]["signal"], serde_json::json!([3, 4, 20]));
    // The batch that one shape gives holds for the others.
    assert_eq!(document["inputs"]["h"], serde_json::json!([1, 3, 12]));
    assert_eq!(document["assumed"], serde_json::json!({}));
    for key in ["ops", "nodes"] {
        let rows = document["profile"][key].as_array().unwrap();
        assert!(rows.iter().any(|row| row["of_peak"].as_f64().is_some_and(|share| share > 0.0)), "{document}");
    }
    assert!(document["profile"]["peak"]["gflops_per_second"].as_f64().is_some_and(|rate| rate > 0.0), "{document}");
    cutover(arguments!["bench", digits("v1"), "--seconds", "0.01", "--profile"]).done().says(&[
        "median ms",
        "Conv",
        "share",
        "of peak",
    ]);
}

#[test]
fn bench_names_what_it_expected() {
    let cases: &[(&[&str], &[&str])] = &[
        (&["--shape", "picture=1x1x8x8"], &["picture", "image"]),
        (&["--shape", "image"], &["NAME=1x3x224x224"]),
        (&["--shape", "image=1xtwo"], &["image=1xtwo", "NAME=1x3x224x224"]),
        (&["--shape", "image=1x1xx8"], &["NAME=1x3x224x224"]),
        (&["--shape", "image=-1x1x8x8"], &["NAME=1x3x224x224"]),
        (&["--shape", "image=1x64"], &["2 axes", "f32[N, 1, 8, 8]"]),
        (&["--shape", "image=1x3x8x8"], &["f32[N, 1, 8, 8]", "f32[1, 3, 8, 8]"]),
        (&["--shape", "image=1x1x8x8", "--shape", "image=2x1x8x8"], &["already"]),
        (&["--shape", "image=99999999x1x8x8"], &["'image'", "bytes"]),
        (&["--shape", "image=18446744073709551615x1x8x8"], &["'image'", "bytes"]),
        (&["--precision", "f99"], &["f99", "f32, bf16, f16 or tf32"]),
        (&["--precision", "f16", "--backend", "reference"], &["reference", "F16"]),
        (&["--precision", "tf32", "--backend", "cpu"], &["tf32", "NVIDIA"]),
        (&["--isa", "mmx"], &["mmx", "scalar"]),
        (&["--seconds", "0"], &["--seconds"]),
        (&["--seconds", "nan"], &["--seconds"]),
        (&["--threads", "100000"], &["threads", "1024"]),
    ];
    let model = digits("v1");
    for (options, parts) in cases {
        let line: Vec<&str> = ["bench", &model, "--json"].into_iter().chain(options.iter().copied()).collect();
        cutover(&line).refuses(parts);
    }
    // What is too small for the model's windows, and what would say so.
    cutover(arguments!["bench", conformance("segmentation.onnx"), "--shape", "image=1x1x1x1"]).refuses(&["MaxPool"]);
}

#[test]
fn convert_and_unpack_keep_the_model() {
    let folder = Folder::new();
    let (inputs, expect) = asked_and_answered(&folder);
    let package = folder.path("digits.cutover");
    let line = arguments![
        "convert",
        digits("v1"),
        "-o",
        &package,
        "--name",
        "digits",
        "--version",
        "2.1.0",
        "--golden",
        &inputs,
        "--json",
    ];
    let document = cutover(line).done().json();
    assert_eq!((&document["manifest"]["name"], &document["manifest"]["version"]), (&"digits".into(), &"2.1.0".into()));
    assert_eq!(document["half"], serde_json::Value::Null);
    let unpacked = folder.path("unpacked");
    let document = cutover(arguments!["unpack", &package, "-o", &unpacked, "--json"]).done().json();
    for file in document["files"].as_array().unwrap() {
        assert!(Path::new(&unpacked).join(file.as_str().unwrap()).is_file(), "{file}");
    }
    for model in [&package, &unpacked, &format!("{unpacked}/model.onnx")] {
        cutover(arguments!["verify", model, "--inputs", &inputs, "--expect", &expect]).done();
        cutover(arguments!["inspect", model]).done();
    }
    cutover(arguments!["unpack", &package, "-o", &unpacked]).refuses(&["unpacked", "already"]);
    cutover(arguments!["unpack", digits("v1"), "-o", folder.path("x")]).refuses(&["model.onnx"]);
    cutover(arguments!["convert", digits("v1"), "-o", folder.path("no/where.cutover")]).refuses(&["/no"]);
    cutover(arguments!["convert", digits("v1"), "-o", folder.path("p.cutover"), "--name", "../up"]).refuses(&["../up"]);
    cutover(arguments!["convert", digits("v1"), "-o", folder.path("p.cutover"), "--golden", &expect])
        .refuses(&["'probabilities'", "image"]);
    for model in CONFORMANCE {
        let package = folder.path(&format!("{model}.cutover"));
        cutover(arguments!["convert", conformance(&format!("{model}.onnx")), "-o", &package])
            .done()
            .says(&["golden vectors are of made-up inputs"]);
    }
}

#[test]
fn half_precision_shows_what_it_costs() {
    let folder = Folder::new();
    let (inputs, expect) = asked_and_answered(&folder);
    let package = folder.path("half.cutover");
    let line = arguments!["convert", digits("v1"), "-o", &package, "--f16", "--golden", &inputs, "--json"];
    let half = cutover(line).done().json()["half"].clone();
    let number = |key: &str| half[key].as_f64().unwrap();
    assert!(number("bytes_after") < 0.6 * number("bytes_before") && number("largest_error") > 0.0, "{half}");
    let sqnr_db = half["outputs"][0]["sqnr_db"].as_f64().unwrap();
    assert_eq!(half["outputs"][0]["name"], "probabilities");
    // f16 keeps 11 bits of every weight, about 66 dB of them.
    assert!((40.0..90.0).contains(&sqnr_db), "{half}");
    let verify = |least: f64| {
        cutover(arguments!["verify", &package, "--inputs", &inputs, "--expect", &expect, "--sqnr", least.to_string()])
    };
    verify(sqnr_db - 3.0).done();
    verify(sqnr_db + 10.0).exits(1);
    cutover(arguments!["convert", digits("v1"), "-o", &package, "--f16"])
        .done()
        .says(&["half precision: weights", "SQNR"]);
}
