//! `cutover shrink` on the digits.

use crate::{Folder, arguments, cutover, digits, repository};
use cutover::{DType, Tensor};
use cutover_cli::tensors::{Named, write};
use std::path::Path;

/// The first `count` images of the data, and their classes.
fn images(count: usize) -> (Tensor, Tensor) {
    let text = std::fs::read_to_string(repository("models/digits/data/digits.csv")).unwrap();
    let rows = text.lines().take(count).map(|line| line.split(',').map(|v| v.parse::<f32>().unwrap()).collect());
    let rows: Vec<Vec<f32>> = rows.collect();
    let pixels = rows.iter().flat_map(|row| row[..64].iter().map(|p| p / 16.0)).collect();
    let labels = rows.iter().map(|row| row[64] as i64).collect();
    (Tensor::from_vec([count, 1, 8, 8], pixels).unwrap(), Tensor::from_vec([count], labels).unwrap())
}

fn save(folder: &Folder, name: &str, tensors: &[(&str, &Tensor)]) -> String {
    let named: Named = tensors.iter().map(|(name, tensor)| (name.to_string(), (*tensor).clone())).collect();
    write(Path::new(&folder.path(name)), &named).unwrap();
    folder.path(name)
}

#[test]
fn integers_keep_the_digits_right() {
    let folder = Folder::new();
    let (image, labels) = images(200);
    let data = save(&folder, "data.npz", &[("image", &image), ("labels", &labels)]);
    let (small, page) = (folder.path("small.onnx"), folder.path("report.html"));
    let line = arguments![
        "shrink",
        digits("v1"),
        "--data",
        &data,
        "--budget",
        "accuracy>=-0.5%",
        "-o",
        &small,
        "--report",
        &page,
        "--json"
    ];
    let document = cutover(line).done().json();
    let number = |name: &str| document[name].as_f64().unwrap();
    assert!(number("weight_bytes_after") < 0.3 * number("weight_bytes_before"), "{document:#}");
    let accuracy = |name: &str| document["evaluation"][name].as_f64().unwrap();
    assert!(accuracy("accuracy_before") > 0.95 && accuracy("accuracy_after") >= accuracy("accuracy_before") - 0.005);
    assert!(number("latency_ratio") > 0.0 && number("file_bytes") > number("weight_bytes_after"));
    // Of all its files: the weights lie beside the model.
    assert!(number("file_bytes_before") > number("weight_bytes_before"), "{document:#}");
    assert_eq!(document["within_budget"], true);
    assert!(document["quantized"].as_array().unwrap().len() >= 4);
    // What was written runs, and says nearly what the original says.
    let (inputs, expected) = (save(&folder, "in.npz", &[("image", &image)]), folder.path("out.npz"));
    cutover(arguments!["run", digits("v1"), "--inputs", &inputs, "--outputs", &expected]).done();
    cutover(arguments!["verify", &small, "--inputs", &inputs, "--expect", &expected, "--sqnr", "25"]).done();
    let page = std::fs::read_to_string(page).unwrap();
    for part in ["<svg", "What was lost", "Activations", "accuracy", "probabilities"] {
        assert!(page.contains(part), "no '{part}' in the page");
    }
    let loads = page.match_indices("http").filter(|(at, _)| !page[*at..].starts_with("http://www.w3.org/")).count();
    assert_eq!(loads, 0, "the page needs nothing but itself");
}

#[test]
fn every_method_writes_a_model_that_runs() {
    let folder = Folder::new();
    let (image, _) = images(24);
    let data = save(&folder, "data.npz", &[("image", &image)]);
    let (small, model) = (folder.path("small.onnx"), digits("v2"));
    for (method, more) in [
        ("static", &["--calibration", "entropy", "--equalize", "--bias-correction", "--activations", "i8"][..]),
        ("static", &["--calibration", "percentile", "--per-tensor", "--clip-weights", "--target", "latency"]),
        ("dynamic", &["--smooth", "0.5"]),
        ("int8", &["--block", "16"]),
        ("int4", &["--gptq"]),
        ("f16", &[]),
        ("bf16", &[]),
    ] {
        let line = [&["shrink", model.as_str(), "--data", &data, "--method", method, "-o", &small], more].concat();
        cutover(&line).done().says(&["weights", "latency", "SQNR"]);
        cutover(arguments!["run", &small, "--inputs", &data]).done();
    }
}

#[test]
fn a_budget_that_cannot_be_met_exits_with_1() {
    let folder = Folder::new();
    let (image, labels) = images(16);
    let data = save(&folder, "data.npz", &[("image", &image), ("labels", &labels)]);
    let small = folder.path("small.onnx");
    cutover(arguments!["shrink", digits("v1"), "--data", &data, "--budget", "accuracy>=50%", "-o", &small])
        .exits(1)
        .says(&["budget is not met", "most sensitive"]);
    assert!(Path::new(&small).exists(), "the nearest is written all the same");
}

#[test]
fn what_is_wrong_with_the_data_is_said() {
    let folder = Folder::new();
    let (image, labels) = images(4);
    let small = folder.path("small.onnx");
    let mut broken = image.to_vec::<f32>().unwrap();
    broken[64] = f32::NAN;
    let broken = Tensor::from_vec([4, 1, 8, 8], broken).unwrap();
    let (few, none) = (Tensor::from_vec([2], vec![1i64, 2]).unwrap(), Tensor::zeros(DType::F32, [0, 1, 8, 8]).unwrap());
    let far = Tensor::from_vec([4], vec![0i64, 1, 2, 10]).unwrap();
    let half = Tensor::from_vec([4], vec![0f32, 1.0, 1.5, 2.0]).unwrap();
    for (name, tensors, parts) in [
        ("unknown.npz", &[("image", &image), ("pixels", &image)][..], &["'pixels'", "'labels' may be there"][..]),
        ("missing.npz", &[("labels", &labels)], &["does not hold input 'image'"]),
        ("few.npz", &[("image", &image), ("labels", &few)], &["2 classes for 4 samples"]),
        ("far.npz", &[("image", &image), ("labels", &far)], &["label of 10", "classes 0 to 9"]),
        ("half.npz", &[("image", &image), ("labels", &half)], &["1.5 of sample 2", "whole numbers"]),
        ("none.npz", &[("image", &none)], &["0 samples"]),
        ("nan.npz", &[("image", &broken)], &["sample 1", "'image'", "NaN"]),
    ] {
        let data = save(&folder, name, tensors);
        cutover(arguments!["shrink", digits("v1"), "--data", &data, "-o", &small]).refuses(parts);
    }
    let (data, model) = (save(&folder, "good.npz", &[("image", &image)]), digits("v1"));
    for (more, part) in [
        (&["--exclude", "nothing"][..], "no such node"),
        (&["--budget", "speed>=2"], "expected accuracy"),
        (&["--budget", "accuracy>=-1%"], "labels"),
        (&["--method", "int2"], "int2"),
        (&["--method", "int4", "--block", "24"], "power of two"),
        (&["--gptq"], "gptq is for"),
        (&["--smooth", "2"], "expected 0 to 1"),
        (&["--percentile", "0"], "percentile 0"),
        (&["--percentile", "NaN"], "expected a number"),
        (&["--batch", "5"], "a run takes 5"),
        (&["--prune-channels", "1.5"], "below 1"),
        (&["--prune-channels", "NaN"], "below 1"),
        (&["--prune-channels", "0.5", "--prune-operations", "0.5"], "cannot be used with"),
        (&["--criterion", "l1"], "for pruning"),
        (&["--prune-channels", "0.5", "--multiple", "0"], "multiple = 0"),
        (&["--prune-channels", "0.5", "--exclude", "nothing"], "no such node"),
        (&["--pattern", "4:2"], "4:2"),
        (&["--recipe", "recipe.toml", "--method", "static"], "cannot be used with"),
        (&["--recipe", "missing.toml"], "cannot read missing.toml"),
    ] {
        let line = [&["shrink", model.as_str(), "--data", &data, "-o", &small], more].concat();
        cutover(&line).refuses(&[part]);
    }
    if !cfg!(feature = "train") {
        let line = arguments!["shrink", &model, "--data", &data, "-o", &small, "--fine-tune", "1"];
        cutover(line).refuses(&["--features train"]);
    }
    assert!(!Path::new(&small).exists(), "nothing was written");
}

/// Pruned, quantized and packed by one line; the package is verified as any other is.
#[test]
fn half_of_the_work_goes_into_a_package() {
    let folder = Folder::new();
    let (image, labels) = images(64);
    let data = save(&folder, "data.npz", &[("image", &image), ("labels", &labels)]);
    let (small, page, cache) = (folder.path("small.cutover"), folder.path("report.html"), folder.path("cache"));
    let line: &[String] = arguments![
        "shrink",
        digits("v1"),
        "--data",
        &data,
        "--prune-operations",
        "0.5",
        "--method",
        "static",
        "-o",
        &small,
        "--name",
        "digits",
        "--version",
        "9",
        "--report",
        &page,
        "--cache",
        &cache,
        "--json"
    ];
    let document = cutover(line).done().json();
    let number = |name: &str| document[name].as_f64().unwrap();
    assert!(number("operations_after") <= 0.5 * number("operations_before"), "{document:#}");
    assert!(number("parameters_after") < number("parameters_before"));
    assert_eq!(document["manifest"]["shrink"]["steps"], serde_json::json!(["prune", "quantize"]));
    let page = std::fs::read_to_string(page).unwrap();
    for part in ["<svg", "Steps", "Channels", "Not pruned", "is an output of the model", "Activations"] {
        assert!(page.contains(part), "no '{part}' in the page");
    }
    // The golden vectors are the original's, and what the small model answers is close enough to them.
    cutover(arguments!["verify", &small]).done();
    let again = cutover(line).done().json();
    for step in again["steps"].as_array().unwrap() {
        assert_eq!(step["cached"], true, "{step:#}");
    }
    assert_eq!(again["latency_ms_after"], document["latency_ms_after"], "measured once");
}

#[test]
fn a_recipe_says_what_is_done() {
    let folder = Folder::new();
    let (image, labels) = images(32);
    let data = save(&folder, "data.npz", &[("image", &image), ("labels", &labels)]);
    let small = folder.path("small.onnx");
    let recipe = |name: &str, text: &str| folder.write(name, text);
    let good = recipe(
        "good.toml",
        "seed = 1\n[[step]]\ndo = \"prune\"\nchannels = 0.25\ncriterion = \"activation\"\n[[step]]\ndo = \"sparsify\"\n\
        pattern = \"2:4\"\n[[step]]\ndo = \"verify\"\nbudget = [\"accuracy>=-99%\"]\n",
    );
    let line = arguments!["shrink", digits("v1"), "--data", &data, "--recipe", &good, "-o", &small];
    cutover(line).done().says(&["1. prune", "2. sparsify", "3. verify", "the budget is met", "no kernels for them"]);
    let inputs = save(&folder, "in.npz", &[("image", &image)]);
    cutover(arguments!["run", &small, "--inputs", &inputs]).done();
    let missed = recipe(
        "missed.toml",
        "[[step]]\ndo = \"prune\"\nchannels = 0.9\n[[step]]\ndo = \"verify\"\nbudget = [\"sqnr>=80\"]",
    );
    let line = arguments!["shrink", digits("v1"), "--data", &data, "--recipe", &missed, "-o", &small];
    cutover(line).exits(1).says(&["not met: sqnr>=80"]);
    for (name, text, parts) in [
        (
            "key.toml",
            "\n[[step]]\ndo = \"prune\"\nratio = 0.5\n",
            &["key.toml", "line 4", "unknown field `ratio`", "`channels`"][..],
        ),
        ("step.toml", "[[step]]\ndo = \"shave\"\n", &["step.toml: line 1", "\"shave\"", "prune, sparsify"]),
        ("none.toml", "", &["0 steps"]),
    ] {
        let bad = recipe(name, text);
        let line = arguments!["shrink", digits("v1"), "--data", &data, "--recipe", &bad, "-o", &small];
        cutover(line).refuses(parts);
    }
    // Before any work is done.
    let nowhere = folder.path("none/small.onnx");
    cutover(arguments!["shrink", digits("v1"), "--data", &data, "-o", &nowhere]).refuses(&["cannot write", "none"]);
}

#[test]
fn convert_shrinks_on_the_way() {
    let folder = Folder::new();
    let (image, _) = images(16);
    let (data, package) = (save(&folder, "data.npz", &[("image", &image)]), folder.path("small.cutover"));
    let line = arguments![
        "convert",
        digits("v1"),
        "-o",
        &package,
        "--data",
        &data,
        "--prune-channels",
        "0.5",
        "--version",
        "4"
    ];
    cutover(line).done().says(&["1. prune", "2. pack", "operations"]);
    cutover(arguments!["verify", &package]).done();
    cutover(arguments!["convert", digits("v1"), "-o", &package, "--prune-channels", "0.5"]).refuses(&["needs --data"]);
}
