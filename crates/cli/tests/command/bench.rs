//! Matrices of measurements and their comparison: what they hold, how they exit, and what they say of input that is wrong.

use crate::{
    Folder, arguments, conformance, cutover, digits,
    hostile::{field, model},
};
use serde_json::{Value as Json, json};
use std::{
    process::{Command, Stdio},
    time::{Duration, Instant},
};

/// A matrix of the digits model that takes next to no time, with more options.
fn quick(more: &[&str]) -> Vec<String> {
    let mut line = arguments!["bench", "--matrix", digits("v1")].to_vec();
    for (option, value) in [("--rounds", "2"), ("--seconds", "0.02"), ("--backend", "cpu")] {
        if !more.contains(&option) {
            line.extend([option, value].map(String::from));
        }
    }
    line.extend(more.iter().map(|text| text.to_string()));
    line
}

fn read(path: &str) -> Json {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn cell<'a>(document: &'a Json, is: &[(&str, Json)]) -> &'a Json {
    let cells = document["cells"].as_array().unwrap();
    let mut found = cells.iter().filter(|cell| is.iter().all(|(key, value)| cell[*key] == *value));
    let one = found.next().unwrap_or_else(|| panic!("no cell {is:?} in {document:#}"));
    assert!(found.next().is_none(), "several cells {is:?}");
    one
}

/// A model whose batch is two, always.
fn fixed(folder: &Folder) -> String {
    let relu = [field(1, b"x"), field(2, b"y"), field(4, b"Relu")];
    folder.write("fixed.onnx", model(&relu, &[2, 8], &[]))
}

#[test]
fn a_matrix_measures_what_can_run_and_says_why_the_rest_can_not() {
    let folder = Folder::new();
    let files = ["m.json", "m.csv", "m.md", "m.svg", "m.html"].map(|name| folder.path(name));
    let line = arguments![
        "bench",
        "--matrix",
        digits("v1"),
        fixed(&folder),
        "--backend",
        "cpu,cuda,reference",
        "--precision",
        "f32,f16,int8",
        "--batch",
        "1,2",
        "--threads",
        "1,2",
        "--rounds",
        "3",
        "--seconds",
        "0.03",
        format!("--json={}", files[0]),
        "--csv",
        &files[1],
        "--markdown",
        &files[2],
        "--plot",
        &files[3],
    ];
    let text = cutover(line).done().says(&["median ms", "p99 ms", "items/s", "why not", "fixed batch of 2"]).stdout;
    let document = read(&files[0]);
    assert_eq!((&document["complete"], &document["rounds_done"]), (&json!(true), &json!(3)));
    assert_eq!(document["cells"].as_array().unwrap().len(), 2 * 3 * 2 * (2 + 1 + 1));
    assert!(document["machine"]["usable_cores"].as_u64().is_some_and(|n| n > 0), "{document}");
    assert_eq!(document["command"][1], "bench");
    let of = |model: &str, backend: &str, precision: &str, batch: u64, threads: Json| {
        let is = [
            ("model", json!(model)),
            ("backend", json!(backend)),
            ("precision", json!(precision)),
            ("batch", json!(batch)),
            ("threads", threads),
        ];
        cell(&document, &is)
    };
    let measured = of("model", "cpu", "f32", 2, json!(2));
    assert_eq!((&measured["gap"], measured["rounds"].as_array().unwrap().len()), (&Json::Null, 3));
    assert_eq!(measured["inputs"]["image"], json!([2, 1, 8, 8]));
    let figures = &measured["figures"];
    let latency = &figures["latency_ms"];
    let order = ["min", "p25", "p75", "p90", "p99", "p999", "max"].map(|name| latency[name].as_f64().unwrap());
    assert!(order.is_sorted() && order[0] > 0.0, "{latency}");
    let median = ["median_low", "median", "median_high"].map(|name| latency[name].as_f64().unwrap());
    assert!(median.is_sorted(), "{latency}");
    for name in ["items_per_second", "open_ms", "compile_ms", "first_ms", "peak_rss_bytes", "runs"] {
        assert!(figures[name].as_f64().is_some_and(|value| value > 0.0), "{name} in {figures}");
    }
    assert!(figures["work"]["of_roofline"].as_f64().is_some_and(|share| share > 0.0 && share < 1.5), "{figures}");
    // What cannot run stands there with its reason, and stops nobody.
    let gap = |cell: &Json, part: &str| {
        let gap = cell["gap"].as_str().unwrap_or_else(|| panic!("{cell:#}"));
        assert!(gap.contains(part) && cell["figures"].is_null(), "expected '{part}' in {cell:#}");
    };
    gap(of("model", "cuda", "f32", 1, Json::Null), "cuda");
    gap(of("model", "reference", "f16", 1, Json::Null), "F16");
    gap(of("fixed", "cpu", "f32", 1, json!(1)), "fixed batch of 2");
    gap(of("fixed", "cpu", "int8", 2, json!(1)), "nothing of it can be quantized");
    assert!(of("fixed", "cpu", "f32", 2, json!(1))["gap"].is_null());
    let integers = of("model", "cpu", "int8", 1, json!(1));
    assert!(integers["gap"].is_null() && integers["notes"].to_string().contains("int8: static"), "{integers:#}");

    let csv = std::fs::read_to_string(&files[1]).unwrap();
    assert_eq!(csv.lines().count(), 1 + document["cells"].as_array().unwrap().len());
    assert!(csv.starts_with("model,backend,precision,batch,threads,device"), "{csv}");
    let markdown = std::fs::read_to_string(&files[2]).unwrap();
    assert!(
        markdown.starts_with("| model | backend |") && markdown.contains("cutover bench --matrix")
            || markdown.contains("bench --matrix")
    );
    let svg = std::fs::read_to_string(&files[3]).unwrap();
    assert!(svg.starts_with("<svg") && svg.contains("cpu int8 batch 1 threads 2"), "{svg}");
    assert!(text.contains("cutover "), "{text}");
    // The same, in a page.
    cutover(&quick(&["--plot", &files[4]])).done();
    let page = std::fs::read_to_string(&files[4]).unwrap();
    assert!(page.starts_with("<!doctype html>") && page.contains("<svg") && page.contains("<table>"), "{page}");
}

#[test]
fn requests_that_come_by_a_clock_are_answered_or_counted() {
    let document = cutover(&quick(&["--rate", "500", "--arrivals", "constant", "--json"])).done().json();
    let figures = &document["cells"][0]["figures"];
    assert_eq!(document["settings"]["rate"], 500.0);
    // Ten milliseconds a round, at 500 a second. On a busy machine some have no answer, and none is forgotten.
    let [runs, unanswered] = ["runs", "unanswered"].map(|name| figures[name].as_u64().unwrap());
    assert!((10..=12).contains(&(runs + unanswered)), "{figures}");
    // More than anyone can answer: those without an answer are in the figures, with what they waited.
    let line = arguments![
        "bench",
        "--matrix",
        conformance("mobile.onnx"),
        "--rounds",
        "1",
        "--seconds",
        "0.05",
        "--backend",
        "reference",
        "--rate",
        "20000",
        "--json",
    ];
    let document = cutover(line).done().json();
    let figures = &document["cells"][0]["figures"];
    assert!(figures["unanswered"].as_u64().unwrap() > 500, "{figures}");
    assert!(figures["latency_ms"]["median"].as_f64().unwrap() > 20.0, "{figures}");
}

#[test]
fn a_matrix_has_an_exit_code_for_everything() {
    // A gap alone is no failure.
    cutover(&quick(&["--backend", "cpu,cuda"])).done();
    cutover(&quick(&["--backend", "cpu,cuda", "--strict"])).exits(1);
    cutover(&quick(&["--strict"])).done();
    cutover(&quick(&["--assert", "p50<=10s and memory<=4GB", "--assert", "throughput>0.1 where backend=cpu"])).done();
    let outcome = cutover(&quick(&["--assert", "p50<=1ns", "--assert", "p50>0ms"])).exits(3);
    assert!(outcome.stderr.contains("assertion: model cpu f32: p50 is "), "{outcome:#?}");
    // What nothing was measured for guards nothing.
    cutover(&quick(&["--backend", "cuda", "--assert", "p50<=1s"])).exits(3);
    let cases: &[(&[&str], &[&str])] = &[
        (&["--backend", "gpu"], &["'gpu'", "auto, cpu, wgpu, cuda, reference"]),
        (&["--backend", "cpu,,wgpu"], &["''"]),
        (&["--precision", "f32,f99"], &["'f99'", "int8"]),
        (&["--batch", "0"], &["--batch 0"]),
        (&["--batch", "1,two"], &["two"]),
        (&["--batch", "1000000"], &["65536"]),
        (&["--threads", "2000"], &["1024"]),
        (&["--rounds", "0"], &["--rounds 0"]),
        (&["--rate", "0"], &["--rate 0"]),
        (&["--rate", "nan"], &["--rate"]),
        (&["--timeout", "0"], &["--timeout"]),
        (&["--seconds", "inf"], &["--seconds"]),
        (&["--arrivals", "poisson"], &["--rate"]),
        (&["--assert", "p50=1ms"], &["--assert", "<="]),
        (&["--assert", "speed<=1ms"], &["'speed'", "p50"]),
        (&["--plot", "m.png"], &[".svg"]),
        (&["--shape", "image"], &["NAME=1x3x224x224"]),
        (&["--csv", "nowhere/m.csv"], &["nowhere"]),
        (&["--json=nowhere/m.json"], &["nowhere"]),
        (&["--profile"], &["--profile"]),
    ];
    for (more, parts) in cases {
        cutover(&quick(more)).refuses(parts);
    }
    cutover(&["bench", "--matrix", "nowhere.onnx"]).refuses(&["nowhere.onnx", "No such file"]);
    cutover(&["bench"]).refuses(&["<MODEL>"]);
    cutover(&["bench", &digits("v1"), "--backend", "cpu,reference"]).refuses(&["--backend", "--matrix"]);
    // A shape that no input has, and a model that is none, are the cells' affair.
    let folder = Folder::new();
    let broken = folder.write("broken.onnx", "this is no model");
    let document = cutover(&["bench", "--matrix", &broken, "--json"]).done().json();
    assert!(document["cells"][0]["gap"].as_str().is_some_and(|gap| !gap.is_empty()), "{document}");
    let document = cutover(&quick(&["--shape", "picture=1x1x8x8", "--json"])).done().json();
    assert!(document["cells"][0]["gap"].as_str().unwrap().contains("'picture'"), "{document}");
}

#[test]
fn a_cell_that_takes_too_long_is_a_gap() {
    let line =
        ["bench", "--matrix", &conformance("mobile.onnx"), "--backend", "reference", "--timeout", "0.05", "--json"];
    let document = cutover(&line).done().json();
    assert_eq!(document["cells"][0]["gap"], "a round took more than 0.05 seconds");
}

#[cfg(unix)]
#[test]
fn an_interrupt_leaves_what_was_measured() {
    let folder = Folder::new();
    let file = folder.path("m.json");
    let mut command = Command::new(env!("CARGO_BIN_EXE_cutover"));
    command.args(["bench", "--matrix", &digits("v1"), "--backend", "cpu", "--rounds", "900", "--seconds", "90"]);
    command.arg(format!("--json={file}")).stdout(Stdio::piped()).stderr(Stdio::null());
    let child = command.spawn().unwrap();
    let end = Instant::now() + Duration::from_secs(60);
    let done = || {
        std::fs::read(&file).ok().and_then(|text| serde_json::from_slice::<Json>(&text).ok()?["rounds_done"].as_u64())
    };
    while done().is_none_or(|rounds| rounds < 2) {
        assert!(Instant::now() < end, "no round in a minute");
        std::thread::sleep(Duration::from_millis(20));
    }
    Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{output:?}");
    let document = read(&file);
    assert_eq!(document["complete"], false);
    assert!(document["cells"][0]["figures"]["runs"].as_u64().is_some_and(|runs| runs > 0), "{document}");
    assert!(String::from_utf8_lossy(&output.stdout).contains("interrupted"), "{output:?}");
}

/// A matrix of ten rounds as a file, and what it holds.
fn measured(folder: &Folder) -> (String, Json) {
    let path = folder.path("before.json");
    let line = [
        "bench",
        "--matrix",
        &digits("v1"),
        "--rounds",
        "10",
        "--seconds",
        "0.05",
        "--backend",
        "cpu",
        "--batch",
        "1,4",
    ];
    let json = format!("--json={path}");
    cutover(&line.iter().copied().chain([json.as_str()]).collect::<Vec<_>>()).done();
    let mut document = read(&path);
    // What a busy machine measures is left to it: these medians are one like the other, and none is there twice.
    for (at, cell) in document["cells"].as_array_mut().unwrap().iter_mut().enumerate() {
        for (number, round) in cell["rounds"].as_array_mut().unwrap().iter_mut().enumerate() {
            round["median_ms"] = json!(1.0 + at as f64 + number as f64 / 100.0);
        }
    }
    folder.write("before.json", document.to_string());
    (path, document)
}

/// Every round's median times `factor`.
fn scale(document: &mut Json, cell: usize, factor: f64) {
    for round in document["cells"][cell]["rounds"].as_array_mut().unwrap() {
        round["median_ms"] = json!(round["median_ms"].as_f64().unwrap() * factor);
    }
}

#[test]
fn a_comparison_finds_what_changed_and_by_how_much() {
    let folder = Folder::new();
    let (before, document) = measured(&folder);
    let compared = cutover(&["bench", "diff", &before, &before, "--threshold", "5%", "--json"]).done().json();
    for cell in compared["cells"].as_array().unwrap() {
        assert_eq!((&cell["ratio"], &cell["verdict"]), (&json!(1.0), &json!("same")), "{cell}");
        assert!(cell["p_corrected"].as_f64().unwrap() > 0.9, "{cell}");
    }
    let mut slower = document.clone();
    scale(&mut slower, 0, 100.0);
    scale(&mut slower, 1, 0.01);
    let slower = folder.write("slower.json", slower.to_string());
    let line = ["bench", "diff", &before, &slower];
    let compared = cutover(&[&line[..], &["--json"]].concat()).done().json();
    let [one, other] = &compared["cells"].as_array().unwrap()[..] else { panic!("{compared}") };
    assert_eq!((&one["verdict"], &other["verdict"]), (&json!("slower"), &json!("faster")));
    assert!((one["ratio"].as_f64().unwrap() - 100.0).abs() < 1e-6, "{one}");
    let interval = ["ratio_low", "ratio", "ratio_high"].map(|name| one[name].as_f64().unwrap());
    assert!(interval.is_sorted(), "{one}");
    // The least that ten rounds a side can give, for the smaller of two.
    assert!((one["p_corrected"].as_f64().unwrap() - 4.0 / 184_756.0).abs() < 1e-9, "{one}");
    assert!((compared["geometric_mean"].as_f64().unwrap() - 1.0).abs() < 1e-6, "{compared}");
    cutover(&line).done().says(&["slower", "faster", "geometric mean of 2 ratios: 1.000"]);
    let refused = cutover(&[&line[..], &["--threshold", "5%"]].concat()).exits(1);
    assert!(
        refused.stderr.contains("slower: model cpu f32 batch 1") && !refused.stdout.contains('\x1b'),
        "{refused:#?}"
    );
    cutover(&[&line[..], &["--threshold", "1000%"]].concat()).exits(1);
    cutover(&[&line[..], &["--assert", "ratio<=1.05 where batch=4"]].concat()).done();
    cutover(&[&line[..], &["--assert", "ratio<=1.05"]].concat()).exits(3);
    for (more, part) in [
        (["--threshold", "5"], "5%"),
        (["--alpha", "0"], "--alpha"),
        (["--assert", "p50<=1ms"], "there is ratio"),
        (["--assert", "ratio<=1ms"], "expected ratio in %"),
    ] {
        cutover(&[&line[..], &more].concat()).refuses(&[part]);
    }
}

#[test]
fn what_is_not_alike_is_not_compared() {
    let folder = Folder::new();
    let (before, document) = measured(&folder);
    let mut other = document.clone();
    other["machine"]["processor"] = json!("another one");
    let path = folder.write("other.json", other.to_string());
    cutover(&["bench", "diff", &before, &path]).refuses(&["processor", "another one", "--force"]);
    let outcome = cutover(&["bench", "diff", &before, &path, "--force"]).done();
    assert!(outcome.stderr.contains("note: differs, processor"), "{outcome:#?}");
    let mut other = document.clone();
    other["settings"]["rate"] = json!(5.0);
    let path = folder.write("rate.json", other.to_string());
    cutover(&["bench", "diff", &before, &path]).refuses(&["rate: none and 5"]);
    // Cells of one side are named; three rounds can't show anything.
    let mut other = document.clone();
    other["cells"][1]["rounds"] = json!([]);
    other["cells"][1]["figures"] = Json::Null;
    other["cells"][1]["gap"] = json!("the dog ate it");
    other["cells"][0]["rounds"].as_array_mut().unwrap().truncate(3);
    let path = folder.write("missing.json", other.to_string());
    cutover(&["bench", "diff", &before, &path]).done().says(&["batch 4: only before (the dog ate it)"]);
    let outcome = cutover(&["bench", "diff", &path, &path]).done();
    assert!(outcome.stderr.contains("1 of 1 cells have too few rounds"), "{outcome:#?}");
}

#[test]
fn files_that_are_no_matrix_are_refused() {
    let folder = Folder::new();
    let (before, document) = measured(&folder);
    let changed = |pointer: &str, value: Json| {
        let mut document = document.clone();
        *document.pointer_mut(pointer).unwrap() = value;
        document.to_string()
    };
    let mut twice = document.clone();
    let first = twice["cells"][0].clone();
    twice["cells"].as_array_mut().unwrap().push(first);
    let cases: Vec<(String, &str)> = vec![
        (String::new(), "no file that"),
        ("{".into(), "no file that"),
        ("[".repeat(100_000), "no file that"),
        ("{}".into(), "no file that"),
        (r#"{"format": "other", "version": 1}"#.into(), "its format is 'other'"),
        (r#"{"format": "cutover-bench", "version": 9}"#.into(), "version 9"),
        (r#"{"format": "cutover-bench", "version": 1}"#.into(), "no file that"),
        (changed("/cells/0/rounds/0/median_ms", json!(-1.0)), "median is -1"),
        (changed("/cells/0/rounds/0/median_ms", json!(0)), "median is 0"),
        (changed("/cells/0/rounds/0/median_ms", json!("fast")), "no file that"),
        (changed("/cells/0/rounds/0/runs", json!(-5)), "no file that"),
        (changed("/cells/0/rounds", json!([])), "figures or rounds"),
        (changed("/cells/0/backend", json!(7)), "no file that"),
        (twice.to_string(), "twice"),
    ];
    for (number, (text, part)) in cases.into_iter().enumerate() {
        let path = folder.write(&format!("{number}.json"), text);
        cutover(&["bench", "diff", &path, &before]).refuses(&[part, &path]);
        cutover(&["bench", "diff", &before, &path]).refuses(&[part, &path]);
    }
    let large = folder.path("large.json");
    std::fs::File::create(&large).unwrap().set_len(1 << 40).unwrap();
    cutover(&["bench", "diff", &large, &before]).refuses(&["more than", &large]);
    cutover(&["bench", "diff", &before, "nowhere.json"]).refuses(&["nowhere.json"]);
}
