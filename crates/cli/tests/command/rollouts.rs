//! Deploy, status and rollback: through a server, and on the store where none runs.

use crate::{Folder, arguments, cutover, digits, server::Server};
use serde_json::{Value as Json, json};
use std::{
    path::Path,
    thread::sleep,
    time::{Duration, Instant},
};

/// A switch that stays at once.
const AT_ONCE: [&str; 4] = ["--strategy", "blue-green", "--parameters", r#"{"observe_s": 0}"#];

#[track_caller]
fn deploy(package: &str, target: &[&str], options: &[&str]) -> Json {
    let line = [&["deploy", "digits", package, "--json"], target, options].concat();
    cutover(&line).done().json()
}

#[track_caller]
fn status(target: &[&str]) -> Json {
    let document = cutover(&[&["status", "--json"], target].concat()).done().json();
    let people = cutover(&[&["status"], target].concat()).done();
    people.says(&["model", "role", "version", "accuracy"]);
    document
}

fn events(target: &[&str]) -> Vec<(String, String)> {
    let document = cutover(&[&["history", "digits", "--json"], target].concat()).done().json();
    let text = |entry: &Json, key: &str| entry[key].as_str().unwrap().to_string();
    document.as_array().unwrap().iter().map(|e| (text(e, "event"), text(e, "version"))).collect()
}

#[track_caller]
fn active(target: &[&str]) -> String {
    status(target)["models"][0]["active"]["version"].as_str().expect("a version in service").to_string()
}

fn without_resumed(events: Vec<(String, String)>) -> Vec<(String, String)> {
    events.into_iter().filter(|(event, _)| event != "resumed").collect()
}

fn pairs(events: &[(&str, &str)]) -> Vec<(String, String)> {
    events.iter().map(|(event, version)| (event.to_string(), version.to_string())).collect()
}

/// The same story whoever is talked to.
fn deploy_and_roll_back(folder: &Folder, target: &[&str]) {
    let (v1, v2, v3) = (folder.package("v1"), folder.package("v2"), folder.package("v3"));
    assert_eq!(deploy(&v1, target, &[])["rollout"], "digits#1");
    assert_eq!(active(target), "v1");
    let with = |line: &[&str]| cutover(&[line, target].concat());
    with(&["rollback", "digits"]).refuses(&["'digits'", "no earlier version"]);
    deploy(&v2, target, &AT_ONCE);
    assert_eq!(active(target), "v2");
    assert_eq!(with(&["rollback", "digits", "--json"]).done().json()["active"], "v1");
    assert_eq!(active(target), "v1");

    deploy(&v3, target, &["--strategy", "canary"]);
    let rollout = status(target)["models"][0]["rollout"].clone();
    assert_eq!((&rollout["strategy"], &rollout["candidate"]["version"]), (&json!("canary"), &json!("v3")));
    assert_eq!(rollout["share"], 0.05);
    with(&["deploy", "digits", &v2]).refuses(&["'digits'", "v3", "under way"]);
    with(&["rollback", "digits"]).done().says(&["digits: version v1 serves"]);
    assert_eq!(status(target)["models"][0]["rollout"], Json::Null);

    let started = events(target);
    let started = without_resumed(started).into_iter().filter(|(e, _)| e == "started" || e == "deployed");
    assert_eq!(started.collect::<Vec<_>>(), pairs(&[("deployed", "v1"), ("started", "v2"), ("started", "v3")]));
    with(&["history", "digits"]).done().says(&["UTC", "rolled back", "v3"]);

    with(&["history", "letters"]).refuses(&["'letters'"]);
    with(&["rollback", "letters"]).refuses(&["'letters'"]);
    with(&["deploy", "letters", &v2]).refuses(&["'digits'", "'letters'"]);
    with(&["deploy", "digits", &v1]).refuses(&["v1", "in service already"]);
    with(&["deploy", "digits", "nowhere.cutover"]).refuses(&["nowhere.cutover"]);
    with(&["deploy", "digits", &digits("v1")]).refuses(&["model.onnx"]);
    with(&["deploy", "digits", &v2, "--parameters", "{"]).refuses(&["--parameters"]);
    with(&["deploy", "digits", &v2, "--parameters", r#"{"stops": []}"#]).refuses(&["--parameters", "stops", "steps"]);
    with(&["deploy", "digits", &v2, "--parameters", r#"{"steps": [{"share": 7, "dwell_s": 1}]}"#]).refuses(&["share"]);
    assert_eq!(active(target), "v1");
}

#[test]
fn a_store_without_a_server_is_changed_itself() {
    let folder = Folder::new();
    let store = folder.path("store");
    cutover(arguments!["status", "--store", &store]).refuses(&[&store, "--server"]);
    deploy_and_roll_back(&folder, &["--store", &store]);
    assert_eq!(cutover(arguments!["status", "--store", &store]).done().stderr, "");
}

#[test]
fn a_server_is_found_by_its_address() {
    let folder = Folder::new();
    let server = Server::start(&folder, &[]);
    deploy_and_roll_back(&folder, &["--server", &server.url]);
    deploy_again_by_store(&folder, server);
}

/// The store leads to the server that holds it, and stands on its own again once that ended.
fn deploy_again_by_store(folder: &Folder, server: Server) {
    let store = folder.path("store");
    let target = ["--store", store.as_str()];
    deploy(&folder.path("v2.cutover"), &target, &AT_ONCE);
    assert_eq!(server.get("/v2/models/digits").json(200)["versions"], json!(["v2"]));
    cutover(arguments!["serve", "--store", &store, "--listen", "127.0.0.1:0"]).refuses(&[&store, "held"]);
    let taken = server.url.trim_start_matches("http://").to_string();
    cutover(arguments!["serve", "--listen", &taken]).refuses(&[&taken]);
    assert_eq!(server.terminate().code(), Some(0));
    assert_eq!(active(&target), "v2");
    let again = Server::start(folder, &[&folder.path("v1.cutover")]);
    assert_eq!(again.get("/v2/models/digits").json(200)["versions"], json!(["v2"]), "what serves already stays");
}

#[test]
fn nobody_at_the_address_is_an_error() {
    // Port 1 is nobody's on a machine that runs tests.
    for line in [&["status"][..], &["rollback", "digits"]] {
        cutover(&[line, &["--server", "http://127.0.0.1:1"]].concat()).refuses(&["http://127.0.0.1:1"]);
    }
    cutover(&["status", "--server", "http://127.0.0.1:1", "--store", "x"]).refuses(&["--store", "--server"]);
}

#[test]
fn a_folder_of_something_else_stays_as_it_is() {
    let folder = Folder::new();
    std::fs::create_dir(folder.path("mine")).unwrap();
    folder.write("mine/notes.txt", "keep");
    let mine = folder.path("mine");
    let package = folder.package("v1");
    for line in [&["status"][..], &["rollback", "digits"], &["deploy", "digits", &package]] {
        cutover(&[line, &["--store", &mine]].concat()).refuses(&["no store", &mine]);
    }
    assert_eq!(std::fs::read_dir(Path::new(&mine)).unwrap().count(), 1);
}

#[test]
fn a_rollout_ends_by_itself_while_requests_come() {
    let folder = Folder::new();
    let server = Server::start(&folder, &[&folder.package("v1")]);
    let parameters = r#"{"observe_s": 0.2}"#;
    deploy(
        &folder.package("v2"),
        &["--server", &server.url],
        &["--strategy", "blue-green", "--parameters", parameters],
    );
    let end = Instant::now() + Duration::from_secs(20);
    let image = json!({ "name": "image", "shape": [1, 1, 8, 8], "datatype": "FP32", "data": vec![0.5; 64] });
    loop {
        let answer = server.post("/v2/models/digits/infer", &json!({ "inputs": [&image] })).json(200);
        assert_eq!(answer["model_version"], "v2");
        if server.get("/cutover/v1/status").json(200)["models"][0]["rollout"].is_null() {
            break;
        }
        assert!(Instant::now() < end, "undecided after 20 s");
        sleep(Duration::from_millis(5));
    }
    assert_eq!(events(&["--server", &server.url]).last(), pairs(&[("promoted", "v2")]).last());
}

#[test]
fn administration_over_http() {
    let folder = Folder::new();
    let server = Server::start(&folder, &[&folder.package("v1")]);
    let v2 = folder.package("v2");
    let models = "/cutover/v1/models";
    let post = |path: &str, body: Json| server.post(&format!("{models}/{path}"), &body);
    post("digits/promote", json!({})).refuses(409, &["no rollout"]);
    post("digits/rollback", json!({})).refuses(409, &["no earlier version"]);
    post("letters/rollback", json!({})).refuses(404, &["'letters'"]);
    server.get(&format!("{models}/letters/history")).refuses(404, &["'letters'"]);
    post("digits/deploy", json!({})).refuses(400, &["the body", "package"]);
    post("digits/deploy", json!({ "package": "/nowhere" })).refuses(400, &["/nowhere"]);
    post("letters/deploy", json!({ "package": v2 })).refuses(400, &["'letters'"]);
    post("digits/deploy", json!({ "package": v2, "strategy": "hope" })).refuses(400, &["the body", "hope"]);
    let answer = post("digits/deploy", json!({ "package": v2 })).json(200);
    assert_eq!(answer["rollout"], "digits#2");
    post("digits/deploy", json!({ "package": v2 })).refuses(409, &["under way"]);
    assert_eq!(post("digits/promote", json!({})).json(200)["active"], "v2");
    let history = server.get(&format!("{models}/digits/history")).json(200);
    let last = history.as_array().unwrap().last().unwrap();
    assert_eq!((&last["event"], &last["version"]), (&json!("promoted"), &json!("v2")));
}

/// A store that nobody serves, with version v1 of digits.
fn store_of_v1(folder: &Folder) -> String {
    let store = folder.path("store");
    deploy(&folder.package("v1"), &["--store", &store], &[]);
    store
}

#[test]
fn every_strategy_starts_and_ends_by_hand() {
    let folder = Folder::new();
    let store = store_of_v1(&folder);
    let (v2, target) = (folder.package("v2"), ["--store", store.as_str()]);
    let with = |line: &[&str]| cutover(&[line, &target].concat());
    for (strategy, parameters) in [
        ("canary", r#"{"steps": [{"share": 0.3, "dwell_s": 1}]}"#),
        ("ab", r#"{"share": 0.4, "metric": "accuracy", "minimum_effect": 0.02}"#),
        ("shadow", r#"{"then": null, "gates": {"agreement_min": 0.8}}"#),
    ] {
        deploy(&v2, &target, &["--strategy", strategy, "--parameters", parameters]);
        let rollout = status(&target)["models"][0]["rollout"].clone();
        assert_eq!((&rollout["strategy"], &rollout["candidate"]["version"]), (&json!(strategy), &json!("v2")));
        assert_eq!(with(&["rollback", "digits", "--json"]).done().json()["active"], "v1");
    }
    deploy(&v2, &target, &["--strategy", "ab"]);
    assert_eq!(with(&["promote", "digits", "--json"]).done().json()["active"], "v2");
    with(&["promote", "digits"]).refuses(&["no rollout"]);
    deploy(&folder.package("v3"), &target, &["--strategy", "sequential"]);
    with(&["history", "digits"]).done().says(&["switched, both fit", "by ab, share 0.5", "asked for"]);
    let bad = ["deploy", "digits", &v2, "--strategy", "ab", "--parameters", r#"{"share": 2}"#];
    with(&bad).refuses(&["share of 2"]);
    let watched = with(&["status", "--watch", "0.05", "--times", "2"]).done();
    assert_eq!(watched.stdout.matches("accuracy").count(), 2, "{watched:#?}");
}

#[test]
fn the_checklist_is_ticked_with_evidence_and_keeps_strategies_from_starting() {
    let folder = Folder::new();
    let store = store_of_v1(&folder);
    let target = ["--store", store.as_str()];
    let with = |line: &[&str]| cutover(&[line, &target].concat());
    with(&["checklist", "digits"]).done().says(&["[x]", "golden: ", "footprint: ", "digests: ", "[ ]", "sign-off"]);
    with(&["checklist", "letters"]).refuses(&["'letters'"]);
    with(&["checklist", "digits", "--require", "luck"]).refuses(&["luck", "sign-off"]);
    with(&["checklist", "digits", "--require", "validation,sign-off"]).exits(1).says(&["NOT COMPLETE"]);
    let v2 = folder.package("v2");
    with(&["deploy", "digits", &v2]).refuses(&["checklist", "sign-off"]);
    let signed = with(&["checklist", "digits", "--sign-off", "v2", "--by", "Ada", "--json"]).exits(1).json();
    assert_eq!((&signed["version"], &signed["complete"]), (&json!("v1"), &json!(false)));
    deploy(&v2, &target, &AT_ONCE);
    let list = with(&["checklist", "digits", "--json"]).done().json();
    assert_eq!((&list["version"], &list["complete"]), (&json!("v2"), &json!(true)));
    assert_eq!(list["lines"].as_array().unwrap().len(), 10);
}

#[test]
fn a_store_is_checked_and_repaired() {
    let folder = Folder::new();
    let store = store_of_v1(&folder);
    let target = ["--store", store.as_str()];
    let with = |line: &[&str]| cutover(&[line, &target].concat());
    assert_eq!(with(&["store", "check", "--json"]).done().json()["lost"], json!([]));
    with(&["store", "check"]).done().says(&["objects", "damaged or missing"]);
    deploy(&folder.package("v2"), &target, &AT_ONCE);
    let history = with(&["store", "check", "--json"]).done().json();
    assert_eq!(history["versions"], 2);
    // The model file of the version in service.
    let objects = std::fs::read_dir(Path::new(&store).join("objects")).unwrap();
    let newest = objects.map(|e| e.unwrap()).max_by_key(|e| e.metadata().unwrap().modified().unwrap()).unwrap().path();
    let bytes = std::fs::read(&newest).unwrap();
    std::fs::remove_file(&newest).unwrap();
    std::fs::write(&newest, &bytes[..bytes.len() / 2]).unwrap();
    with(&["store", "check"]).exits(1).says(&["lost: object", "digits v2"]);
    with(&["store", "repair"]).exits(1).says(&["v1 is now"]);
    with(&["store", "repair"]).done().says(&["nothing is damaged"]);
    assert_eq!(active(&target), "v1");
    cutover(&["store", "check", "--store", &folder.path("nowhere")]).refuses(&["no store"]);
}

#[test]
fn whoever_holds_the_store_is_asked_through_its_socket() {
    let folder = Folder::new();
    let server = Server::start(&folder, &[&folder.package("v1")]);
    let store = folder.path("store");
    let with = |line: &[&str]| cutover(&[line, &["--store", &store]].concat());
    let image = json!({ "name": "image", "shape": [1, 1, 8, 8], "datatype": "FP32", "data": vec![0.5; 64] });
    server.post("/v2/models/digits/infer", &json!({ "id": "r-1", "inputs": [image] })).json(200);
    assert_eq!(with(&["feedback", "digits", "--label", "r-1=3", "--json"]).done().json()["counted"], 1);
    with(&["feedback", "digits", "--label", "r-1=3"]).exits(1).says(&["not counted", "r-1"]);
    with(&["feedback", "digits", "--label", "three"]).refuses(&["ID=CLASS"]);
    let labels = folder.write("labels.csv", "r-2,3\n");
    with(&["feedback", "digits", "--file", &labels]).exits(1).says(&["r-2"]);
    with(&["store", "check"]).done();
    with(&["checklist", "digits"]).done().says(&["1 requests counted"]);
    assert_eq!(status(&["--store", &store])["models"][0]["active"]["labels"], 1);
    assert_eq!(server.terminate().code(), Some(0));
}

#[test]
fn streams_are_pinned_over_http() {
    let folder = Folder::new();
    let server = Server::start(&folder, &[&folder.package("v1")]);
    let ask = |parameters: Json| {
        let image = json!({ "name": "image", "shape": [1, 1, 8, 8], "datatype": "FP32", "data": vec![0.5; 64] });
        server.post("/v2/models/digits/infer", &json!({ "parameters": parameters, "inputs": [image] }))
    };
    ask(json!({ "sequence_id": 7 })).refuses(409, &["'7'", "started again"]);
    ask(json!({ "sequence_id": 7, "sequence_start": "yes" })).refuses(400, &["sequence_start"]);
    assert_eq!(ask(json!({ "sequence_id": 7, "sequence_start": true })).json(200)["model_version"], "v1");
    deploy(&folder.package("v2"), &["--server", &server.url], &AT_ONCE);
    assert_eq!(ask(json!({ "sequence_id": 7 })).json(200)["model_version"], "v1");
    assert_eq!(ask(json!({})).json(200)["model_version"], "v2");
    ask(json!({ "sequence_id": 7, "sequence_end": true })).json(200);
    ask(json!({ "sequence_id": 7 })).refuses(409, &["started again"]);
}

#[test]
fn packages_say_all_that_they_are_told() {
    let folder = Folder::new();
    let package = folder.path("2.cutover");
    let (model, labels) = (digits("v2"), "probabilities=0,1,2,3,4,5,6,7,8,9");
    let line = [
        &["pack", &model, "-o", &package, "--name", "digits", "--version", "2", "--description", "half as wide"][..],
        &["--security-epoch", "3", "--labels", labels, "--range", "image=0:1", "--tolerance", "cpu=1e-2:1e-3"],
        &["--gates", r#"{"accuracy_drop_max": 0.01}"#, "--latency-ms-max", "5000"],
    ]
    .concat();
    cutover(&line).done().says(&["digits version 2"]);
    cutover(&["verify", &package]).done().says(&["are what their digests say", "probabilities"]);
    let inspected = cutover(&["inspect", &package, "--json"]).done().json();
    let manifest = inspected["package"]["manifest"].clone();
    assert_eq!((&manifest["security_epoch"], &manifest["description"]), (&json!(3), &json!("half as wide")));
    assert_eq!(
        (&manifest["inputs"][0]["range"], &manifest["outputs"][0]["labels"][9]),
        (&json!([0.0, 1.0]), &json!("9"))
    );
    assert_eq!(manifest["resources"]["latency_ms_max"], 5000.0);
    cutover(&["inspect", &package]).done().says(&["half as wide", "golden tolerance, cpu", "labels of probabilities"]);
    let unpacked = folder.path("unpacked");
    cutover(&["unpack", &package, "-o", &unpacked]).done();
    let again = folder.path("3.cutover");
    cutover(&["pack", &unpacked, "-o", &again, "--version", "3"]).done();
    let repacked = cutover(&["inspect", &again, "--json"]).done().json()["package"]["manifest"].clone();
    assert_eq!((&repacked["version"], &repacked["description"]), (&json!("3"), &json!("half as wide")));
    assert_eq!(repacked["outputs"], manifest["outputs"]);
    cutover(&["pack", &digits("v2"), "-o", &again, "--labels", "nothing=a"]).refuses(&["nothing"]);
    cutover(&["pack", &digits("v2"), "-o", &again, "--gates", "{\"alpha\": 3}"]).refuses(&["alpha"]);
    // A device too slow for what the package allows does not admit it.
    cutover(&["pack", &digits("v2"), "-o", &again, "--name", "digits", "--latency-ms-max", "0.000001"]).done();
    cutover(&["deploy", "digits", &again, "--store", &folder.path("s")]).refuses(&["not admitted", "ms"]);
    cutover(&["verify", &digits("v2")]).refuses(&["no package", "--inputs"]);
}

#[test]
fn a_swap_is_measured() {
    let folder = Folder::new();
    let (v1, v2) = (folder.package("v1"), folder.package("v2"));
    let line = ["bench", "--swap", &v1, &v2, "--swaps", "12", "--pause-ms", "30", "--json"];
    let found = cutover(&line).done().json();
    assert_eq!((&found["failed"], &found["good"]), (&json!(0), &json!(true)), "{found:#}");
    for key in ["cold_to_first_answer_ms", "peak_memory_bytes"] {
        assert!(found[key].as_f64().unwrap() > 0.0, "{key}: {found:#}");
    }
    assert!(found["pause_ms"]["p99"].is_number() && found["rollback_ms"]["p50"].is_number(), "{found:#}");
    cutover(&["bench", "--swap", &v1, &v1]).refuses(&["two versions"]);
    cutover(&["bench", "--swap", &v1]).refuses(&["OTHER"]);
}
