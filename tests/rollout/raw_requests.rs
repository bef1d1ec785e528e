//! Requests of pictures and texts: each version makes its inputs of them in its own way.

use cutover::{
    DType, Host, HostOptions, Model, Request, Strategy, Tensor, Value,
    graph::{
        Dim, Graph, TensorFact,
        ops::{Unary, UnaryFunction},
    },
    input::{Picture, Preprocessing, Text},
    package::{Contents, Golden, Manifest, write},
    runtime::BlueGreen,
};
use cutover_tests::host;
use std::path::{Path, PathBuf};

/// A picture of one pixel, (255, 0, 51), as PNM in base64.
const PIXEL: &str = "UDYKMSAxCjI1NQr/ADM=";

const TOKENIZER: &str = r#"{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
    "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null, "decoder": null,
    "model": {"type": "WordLevel", "vocab": {"[UNK]": 1, "red": 3, "fox": 4}, "unk_token": "[UNK]"}}"#;

/// `y = -x`.
fn negation(input: &str, dtype: DType, dims: &[Dim]) -> Graph {
    let mut graph = Graph::new("negation");
    let x = graph.add_input(input, TensorFact::new(dtype, dims.to_vec()));
    let op = Unary { function: UnaryFunction::Neg };
    let node = graph.add_node("negate", op.into(), vec![Some(x)], vec!["y".to_string()]).unwrap();
    let output = graph.node(node).outputs[0];
    graph.set_outputs(vec![output]);
    graph
}

fn packed(graph: &Graph, golden: [Tensor; 2], version: &str, described: Preprocessing, folder: &Path) -> PathBuf {
    let input = graph.value(graph.inputs()[0]).name.clone();
    let [x, y] = golden;
    let golden = Golden { inputs: vec![(input, x)], outputs: vec![("y".to_string(), y)] };
    let tokenizer = (!described.texts.is_empty()).then_some(TOKENIZER.as_bytes());
    let manifest = Manifest { preprocessing: described, ..Manifest::of(graph, "m", version).unwrap() };
    let path = folder.join(format!("{version}.cutover"));
    write(&Contents { graph, manifest, golden: &golden, profile: None, tokenizer }, &path).unwrap();
    path
}

fn pictures(version: &str, mean: Option<f32>, folder: &Path) -> PathBuf {
    let graph = negation("image", DType::F32, &[Dim::symbol("N"), 3.into(), Dim::symbol("H"), Dim::symbol("W")]);
    let golden = [1.0, -1.0].map(|v: f32| Tensor::from_vec([1, 3, 1, 1], vec![v; 3]).unwrap());
    let picture = |mean| Picture { input: "image".to_string(), mean: vec![mean], ..Picture::default() };
    let described = Preprocessing { pictures: mean.map(picture).into_iter().collect(), texts: Vec::new() };
    packed(&graph, golden, version, described, folder)
}

fn ask(host: &Host, name: &str, value: &str) -> Result<Tensor, String> {
    let value = Value::from(Tensor::from_strings([1], vec![value.to_string()]).unwrap());
    let request = Request { inputs: vec![(name.to_string(), value)], ..Request::default() };
    let mut answer = host.infer("m", request).map_err(|error| error.to_string())?;
    Ok(answer.outputs.remove(0).1.as_tensor().unwrap().clone())
}

fn at_once() -> Strategy {
    Strategy::BlueGreen(BlueGreen { observe_s: 0.0, ..BlueGreen::default() })
}

#[test]
fn each_version_makes_its_inputs_of_pictures_in_its_own_way() {
    let folder = tempfile::tempdir().unwrap();
    let store = folder.path().join("store");
    let near = |tensor: Tensor, expected: [f32; 3]| {
        let values = tensor.to_vec::<f32>().unwrap();
        assert!(values.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-6), "{values:?}, expected {expected:?}");
    };
    {
        let host = host(&store, HostOptions::default());
        host.deploy("m", &pictures("v1", Some(0.0), folder.path()), at_once()).unwrap();
        near(ask(&host, "image", PIXEL).unwrap(), [-1.0, 0.0, -0.2]);
        host.deploy("m", &pictures("v2", Some(0.5), folder.path()), at_once()).unwrap();
        near(ask(&host, "image", PIXEL).unwrap(), [-0.5, 0.5, 0.3]);
        let refused = host.deploy("m", &pictures("v3", None, folder.path()), at_once()).unwrap_err().to_string();
        assert!(refused.contains("'image'"), "{refused}");
        let error = ask(&host, "image", "no picture").unwrap_err();
        assert!(error.contains("sample 1 of 'image'"), "{error}");
    }
    let host = host(&store, HostOptions::default());
    near(ask(&host, "image", PIXEL).unwrap(), [-0.5, 0.5, 0.3]);
}

#[test]
fn a_tokenizer_is_kept_in_the_store_and_counted_by_its_check() {
    let folder = tempfile::tempdir().unwrap();
    let store = folder.path().join("store");
    let graph = negation("input_ids", DType::I64, &[Dim::symbol("N"), Dim::symbol("T")]);
    let golden = [1, -1].map(|v: i64| Tensor::from_vec([1, 2], vec![v; 2]).unwrap());
    let described = Preprocessing { pictures: Vec::new(), texts: vec![Text::default()] };
    let path = packed(&graph, golden, "v1", described, folder.path());
    {
        let host = host(&store, HostOptions::default());
        host.deploy("m", &path, at_once()).unwrap();
        assert_eq!(ask(&host, "text", "red fox").unwrap().to_vec::<i64>().unwrap(), [-3, -4]);
    }
    let host = host(&store, HostOptions::default());
    assert_eq!(ask(&host, "text", "fox what").unwrap().to_vec::<i64>().unwrap(), [-4, -1]);
    let checked = host.check_store().unwrap();
    assert!(checked.lost.is_empty() && checked.bytes > TOKENIZER.len() as u64, "{checked:?}");
    // A bare model and a package are asked in the same way.
    let model = Model::open(&path).unwrap();
    let given = vec![("text".to_string(), Value::from(Tensor::from_strings([1], vec!["fox".to_string()]).unwrap()))];
    let prepared = model.preprocessor().unwrap().prepare(&given).unwrap();
    assert_eq!(prepared[0].1.as_tensor().unwrap().to_vec::<i64>().unwrap(), [4]);
}
