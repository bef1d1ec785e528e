//! The Open Inference Protocol v2 over HTTP, feedback and metrics, as clients of any make speak them.

use crate::{Folder, arguments, conformance, cutover, server::Server};
use serde_json::{Value as Json, json};
use std::collections::BTreeMap;

fn image() -> Vec<f32> {
    (0..64).map(|i| (i * 5 % 17) as f32 / 16.0).collect()
}

fn input(shape: &[i64], datatype: &str, data: Json) -> Json {
    json!({ "name": "image", "shape": shape, "datatype": datatype, "data": data })
}

fn one_image() -> Json {
    input(&[1, 1, 8, 8], "FP32", json!(image()))
}

#[test]
fn health_and_metadata_are_those_of_the_protocol() {
    let folder = Folder::new();
    let server = Server::start(&folder, &[&folder.package("v1"), &conformance("transformer.onnx")]);
    assert_eq!(server.document["models"], json!(["digits", "transformer"]));
    assert_eq!(server.get("/v2/health/live").json(200)["live"], true);
    assert_eq!(server.get("/v2/health/ready").json(200)["ready"], true);
    let about = server.get("/v2").json(200);
    assert_eq!((&about["name"], &about["version"]), (&json!("cutover"), &json!(env!("CARGO_PKG_VERSION"))));
    assert!(about["extensions"].is_array());
    let digits = json!({
        "name": "digits", "versions": ["v1"], "platform": "cutover", "ready": true,
        "inputs": [{ "name": "image", "datatype": "FP32", "shape": [-1, 1, 8, 8] }],
        "outputs": [{ "name": "probabilities", "datatype": "FP32", "shape": [-1, 10] }],
    });
    for path in ["", "/ready", "/versions/v1", "/versions/v1/ready"] {
        assert_eq!(server.get(&format!("/v2/models/digits{path}")).json(200), digits, "{path}");
    }
    let transformer = server.get("/v2/models/transformer").json(200);
    assert_eq!(transformer["inputs"][0], json!({ "name": "tokens", "datatype": "INT64", "shape": [-1, -1] }));

    let missing: &[(&str, &str, u16, &str)] = &[
        ("GET", "/v2/models/letters", 404, "'letters'"),
        ("GET", "/v2/models/letters/ready", 404, "'letters'"),
        ("GET", "/v2/models/digits/versions/v9", 404, "'v9'"),
        ("POST", "/v2/models/letters/infer", 404, "'letters'"),
        ("POST", "/v2/models/digits/versions/v9/infer", 404, "'v9'"),
        ("GET", "/v1/models", 404, "no such path"),
        ("GET", "/v2/models/digits/infer", 405, "method"),
        ("DELETE", "/v2/models/digits", 405, "method"),
    ];
    for (method, path, status, part) in missing {
        let body = json!({ "inputs": [one_image()] }).to_string();
        server.ask(method, path, Some(&body)).refuses(*status, &[part]);
    }
}

#[test]
fn infer_answers_what_the_model_answers() {
    let folder = Folder::new();
    let package = folder.package("v1");
    let inputs = folder.write("in.json", json!({ "image": { "shape": [1, 1, 8, 8], "data": image() } }).to_string());
    let expected = cutover(arguments!["run", &package, "--inputs", inputs, "--json"]).done().json();
    let server = Server::start(&folder, &[&package]);
    let rows: Vec<&[f32]> = image_rows();
    let bodies = [
        json!({ "id": "a-1", "inputs": [one_image()] }),
        json!({ "id": "a-1", "inputs": [input(&[1, 1, 8, 8], "FP32", json!([[rows]]))] }),
        json!({ "id": "a-1", "inputs": [one_image()], "outputs": [{ "name": "probabilities" }] }),
        json!({ "id": "a-1", "inputs": [one_image()], "parameters": { "timeout": 30_000_000, "cutover_key": "me" } }),
        json!({ "id": "a-1", "inputs": [one_image()], "of": "a later version of the protocol" }),
    ];
    for path in ["/v2/models/digits/infer", "/v2/models/digits/versions/v1/infer"] {
        for body in &bodies {
            let mut answer = server.post(path, body).json(200);
            let data = answer["outputs"][0]["data"].take();
            assert_eq!(floats(&data), floats(&expected["probabilities"]["data"]));
            assert_eq!(
                answer,
                json!({ "id": "a-1", "model_name": "digits", "model_version": "v1", "outputs": [{
                    "name": "probabilities", "datatype": "FP32", "shape": [1, 10], "data": null,
                }] })
            );
        }
    }
    // Without an id, one is made: feedback needs it.
    let made = server.post("/v2/models/digits/infer", &json!({ "inputs": [one_image()] })).json(200);
    assert!(made["id"].as_str().is_some_and(|id| !id.is_empty()));
}

fn floats(numbers: &Json) -> Vec<f32> {
    serde_json::from_value(numbers.clone()).unwrap()
}

fn image_rows() -> Vec<&'static [f32]> {
    Box::leak(image().into_boxed_slice()).chunks(8).collect()
}

#[test]
fn infer_says_what_is_wrong_with_a_request() {
    let folder = Folder::new();
    let server = Server::start(&folder, &[&folder.package("v1")]);
    let infer = "/v2/models/digits/infer";
    let with = |inputs: Json| json!({ "inputs": inputs });
    let short: Vec<f32> = vec![0.0; 63];
    let cases: &[(Json, &[&str])] = &[
        (with(json!([])), &["'image'", "missing"]),
        (with(json!([input(&[1, 1, 8, 8], "FP32", json!(short))])), &["'image'", "63 elements", "[1, 1, 8, 8]"]),
        (with(json!([input(&[1, 64], "FP32", json!(image()))])), &["'image'", "f32[N, 1, 8, 8]", "f32[1, 64]"]),
        (with(json!([input(&[1, 1, 8, 8], "FP64", json!(image()))])), &["'image'", "f32[N, 1, 8, 8]", "f64"]),
        (with(json!([input(&[1, 1, 8, 8], "FLOAT", json!(image()))])), &["'image'", "'FLOAT'", "FP32"]),
        (with(json!([input(&[1, 1, 8, 8], "INT8", json!(image()))])), &["'image'", "element 0"]),
        (with(json!([input(&[1, 1, 8, 8], "FP32", json!(vec!["a"; 64]))])), &["'image'", "element 0", "a number"]),
        (with(json!([input(&[-1, 1, 8, 8], "FP32", json!(image()))])), &["-1"]),
        (with(json!([input(&[1 << 40, 1 << 20, 8, 8], "FP32", json!([1]))])), &["'image'", "memory"]),
        (with(json!([input(&[1 << 40, 1, 8, 8], "FP32", json!([1]))])), &["'image'", "1 elements"]),
        (with(json!([one_image(), one_image()])), &["'image'", "twice"]),
        (with(json!([one_image(), { "name": "b", "shape": [1], "datatype": "FP32", "data": [1] }])), &["'b'", "image"]),
        (with(json!([{ "name": "image", "shape": [1, 1, 8, 8], "datatype": "FP32" }])), &["data"]),
        (with(json!("image")), &["the body"]),
        (json!({}), &["the body", "inputs"]),
        (json!([]), &["the body", "object"]),
        (json!(["a", {}, [], null]), &["the body", "object"]),
        (json!({ "inputs": [one_image()], "outputs": [{ "name": "logits" }] }), &["'logits'", "probabilities"]),
        (json!({ "inputs": [one_image()], "parameters": { "timeout": "soon" } }), &["timeout", "microseconds"]),
    ];
    for (body, parts) in cases {
        server.post(infer, body).refuses(400, parts);
    }
    let deep = format!("{{\"inputs\": {}", "[".repeat(100_000));
    for text in ["", "{", "not JSON", "\u{0}", deep.as_str()] {
        server.ask("POST", infer, Some(text)).refuses(400, &["the body"]);
    }
    let long = format!("{{\"inputs\": [{}", " ".repeat((64 << 20) + 1));
    server.ask("POST", infer, Some(&long)).refuses(413, &[]);
    server.post(infer, &json!({ "inputs": [one_image()] })).json(200);
}

#[test]
fn labels_count_for_the_version_that_answered() {
    let folder = Folder::new();
    let server = Server::start(&folder, &[&folder.package("v1")]);
    let infer = |id: &str, images: usize| {
        let data: Vec<f32> = image().repeat(images);
        let body = json!({ "id": id, "inputs": [input(&[images as i64, 1, 8, 8], "FP32", json!(data))] });
        let scores = server.post("/v2/models/digits/infer", &body).json(200)["outputs"][0]["data"].clone();
        let scores: Vec<f64> = scores.as_array().unwrap().iter().map(|s| s.as_f64().unwrap()).collect();
        (0..10).max_by(|&a, &b| scores[a].total_cmp(&scores[b])).unwrap()
    };
    let feedback = |body: Json| server.post("/cutover/v1/models/digits/feedback", &body);
    let class = infer("one", 1);
    let other = (class + 1) % 10;
    assert_eq!(feedback(json!({ "id": "one", "label": class })).json(200)["counted"], 1);
    infer("two", 2);
    feedback(json!({ "id": "two", "label": class })).refuses(400, &["'two'", "2 classes", "1 labels"]);
    infer("both", 2);
    infer("wrong", 1);
    let many = json!({ "labels": [
        { "id": "both", "label": [class, class] }, { "id": "wrong", "label": other }, { "id": "never", "label": 1 },
    ] });
    let answer = feedback(many).json(200);
    assert_eq!(answer["counted"], 2);
    assert!(answer["refused"][0].as_str().unwrap().contains("'never'"));
    feedback(json!({ "id": "never", "label": 1 })).refuses(404, &["'never'"]);
    feedback(json!({ "id": "one" })).refuses(400, &["the body"]);
    feedback(json!({ "id": "one", "label": "seven" })).refuses(400, &["the body"]);
    server
        .post("/cutover/v1/models/letters/feedback", &json!({ "id": "one", "label": 1 }))
        .refuses(404, &["'letters'"]);
    // Three of the four labels are right.
    let status = server.get("/cutover/v1/status").json(200);
    let active = &status["models"][0]["active"];
    assert_eq!((&active["labels"], &active["accuracy"]), (&json!(4), &json!(0.75)), "{status}");
}

/// Samples by name and labels, of the text format: `name{label="value",…} number`.
fn samples(text: &str) -> BTreeMap<String, f64> {
    let mut samples = BTreeMap::new();
    for line in text.lines().filter(|l| !l.is_empty() && !l.starts_with('#')) {
        let (name, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("'{line}'"));
        let value = value.parse().unwrap_or_else(|_| panic!("'{line}'"));
        let bare = name.split('{').next().unwrap();
        assert!(bare.chars().all(|c| c.is_ascii_alphanumeric() || c == '_'), "'{line}'");
        assert!(name.contains('{') == name.ends_with('}'), "'{line}'");
        assert!(samples.insert(name.to_string(), value).is_none(), "'{name}' is there twice");
    }
    samples
}

#[test]
fn metrics_are_what_prometheus_reads() {
    let folder = Folder::new();
    let server = Server::start(&folder, &[&folder.package("v1")]);
    for _ in 0..3 {
        server.post("/v2/models/digits/infer", &json!({ "inputs": [one_image()] })).json(200);
    }
    server.post("/v2/models/digits/infer", &json!({ "inputs": [] })).refuses(400, &[]);
    let text = server.get("/metrics").text;
    for (family, kind) in
        [("cutover_requests", "counter"), ("cutover_share", "gauge"), ("cutover_latency_seconds", "histogram")]
    {
        assert!(
            text.contains(&format!("# TYPE {family} {kind}\n")) && text.contains(&format!("# HELP {family} ")),
            "{text}"
        );
    }
    assert!(text.ends_with("# EOF\n"));
    let samples = samples(&text);
    let labels = r#"model="digits",version="v1",role="active""#;
    let of =
        |name: &str| samples.get(&format!("{name}{{{labels}}}")).copied().unwrap_or_else(|| panic!("{name} in {text}"));
    assert_eq!(of("cutover_requests_total"), 3.0);
    assert_eq!(of("cutover_errors_total"), 0.0);
    assert_eq!(of("cutover_labels_total"), 0.0);
    assert_eq!(of("cutover_in_flight"), 0.0);
    assert_eq!(of("cutover_share"), 1.0);
    assert!(of("cutover_weight_bytes") > 100_000.0);
    assert_eq!(of("cutover_latency_seconds_count"), 3.0);
    assert!(of("cutover_latency_seconds_sum") > 0.0);
    // Cumulative, and the last bucket holds all.
    let bounds = text.lines().filter(|l| l.starts_with("cutover_latency_seconds_bucket"));
    let counts: Vec<f64> = bounds.map(|l| l.rsplit_once(' ').unwrap().1.parse().unwrap()).collect();
    assert!(counts.is_sorted() && counts.last() == Some(&3.0), "{counts:?}");
    assert_eq!(samples[&format!(r#"cutover_latency_seconds_bucket{{le="+Inf",{labels}}}"#)], 3.0);
    assert_eq!(samples["cutover_waiting"], 0.0);
    assert!(samples.contains_key("cutover_swaps_total"));
}
