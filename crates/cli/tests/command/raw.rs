//! Tables, pictures and texts as inputs.

use crate::{Folder, arguments, cutover, digits, repository};

/// The first `count` digits as a table with a header, pixels from 0 to 1.
fn table(count: usize) -> String {
    let text = std::fs::read_to_string(repository("models/digits/data/digits.csv")).unwrap();
    let mut table = (0..64).map(|pixel| format!("p{pixel},")).collect::<String>() + "label\n";
    for line in text.lines().take(count) {
        let (pixels, label) = line.rsplit_once(',').unwrap();
        for pixel in pixels.split(',') {
            table += &format!("{},", pixel.parse::<f32>().unwrap() / 16.0);
        }
        table += &format!("{label}\n");
    }
    table
}

#[test]
fn a_table_is_run_and_shrunk_by() {
    let folder = Folder::new();
    let data = folder.write("digits.csv", table(60));
    let ran = cutover(arguments!["run", digits("v2"), "--inputs", &data, "--json"]).done().json();
    assert_eq!(ran["probabilities"]["shape"], serde_json::json!([60, 10]));
    let small = folder.path("small.onnx");
    let document = cutover(arguments!["shrink", digits("v2"), "--data", &data, "-o", &small, "--json"]).done().json();
    assert!(document["evaluation"]["accuracy_before"].as_f64().unwrap() > 0.9, "{document:#}");
}

#[test]
fn a_table_that_does_not_fit_is_refused_by_line_and_column() {
    let folder = Folder::new();
    let model = digits("v2");
    let refuses = |content: String, parts: &[&str]| {
        let data = folder.write("bad.csv", content);
        cutover(arguments!["run", &model, "--inputs", &data]).refuses(parts);
    };
    refuses(table(3).replacen("0.3125", "?", 1), &["line 2", "'p2'", "'?' is no number"]);
    refuses("a,b\n1,2\n".to_string(), &["2 columns", "image", "[1, 8, 8]"]);
    refuses("a,b\n1\n".to_string(), &["bad.csv"]);
}

#[test]
fn pictures_and_texts_need_to_know_how_they_become_inputs() {
    let folder = Folder::new();
    let model = digits("v2");
    let picture = folder.write("digit.pgm", "P2 8 8 255\n");
    cutover(arguments!["run", &model, "--inputs", &picture]).refuses(&["--preprocess"]);
    let described = folder.write("how.toml", "[[pictures]]\ninput = \"image\"\ncolour = \"grey\"\n");
    let line = arguments!["run", &model, "--inputs", &picture, "--preprocess", &described];
    cutover(line).refuses(&["how.toml", "colour"]);
    let described = folder.write("how.toml", "[[pictures]]\ninput = \"picture\"\ncolor = \"grey\"\n");
    let line = arguments!["run", &model, "--inputs", &picture, "--preprocess", &described];
    cutover(line).refuses(&["'picture'", "no such input"]);
    let described = folder.write("how.toml", "[[texts]]\nids = \"image\"\n");
    let text = folder.write("texts.txt", "one\ntwo\n");
    let line = arguments!["run", &model, "--inputs", &text, "--preprocess", &described];
    cutover(line).refuses(&["'image'", "token ids"]);
}

/// Where the tests are built with pictures, as `cargo xtask test` does, they are read; elsewhere the build says what it lacks.
#[test]
fn a_package_says_how_pictures_become_its_inputs() {
    let folder = Folder::new();
    let pixels = (0..64).map(|pixel| format!("{} ", pixel * 4)).collect::<String>();
    let picture = folder.write("digit.pgm", format!("P2 8 8 255\n{pixels}\n"));
    let described = folder.write("how.toml", "[[pictures]]\ninput = \"image\"\ncolor = \"grey\"\n");
    let package = folder.path("digits.cutover");
    cutover(arguments!["pack", digits("v2"), "-o", &package, "--preprocess", &described]).done();
    let shown = cutover(arguments!["inspect", &package, "--json"]).done();
    assert!(shown.stdout.contains("\"pictures\""), "{}", shown.stdout);
    let ran = cutover(arguments!["run", &package, "--inputs", &picture, "--json"]);
    if ran.code == Some(0) {
        let values = (0..64).map(|pixel| (pixel * 4) as f32 / 255.0).collect::<Vec<_>>();
        let tensors = folder.write(
            "in.json",
            serde_json::json!({ "image": { "dtype": "f32", "shape": [1, 1, 8, 8], "data": values } }).to_string(),
        );
        let same = cutover(arguments!["run", &package, "--inputs", &tensors, "--json"]).done().json();
        let values = |document: &serde_json::Value| {
            let data = document["probabilities"]["data"].as_array().unwrap().clone();
            data.iter().map(|v| v.as_f64().unwrap()).collect::<Vec<_>>()
        };
        // A byte is multiplied by 1/255, not divided by 255.
        let (ran, same) = (values(&ran.json()), values(&same));
        assert!(ran.len() == 10 && ran.iter().zip(&same).all(|(a, b)| (a - b).abs() < 1e-5), "{ran:?}, {same:?}");
        let broken = folder.write("broken.pgm", "P2 8 8");
        cutover(arguments!["run", &package, "--inputs", &broken]).refuses(&["broken.pgm: "]);
    } else {
        ran.refuses(&["feature `image`"]);
    }
}
