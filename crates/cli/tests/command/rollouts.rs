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
    let document = cutover(&[&["status", "--history", "digits", "--json"], target].concat()).done().json();
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
    with(&["status", "--history", "digits"]).done().says(&["unix ms", "rolled back", "v3"]);

    with(&["status", "--history", "letters"]).refuses(&["'letters'"]);
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
