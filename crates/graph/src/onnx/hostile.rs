//! Files that lie: each must be refused with an error that names what is wrong and where.

use super::{
    ImportOptions, Limits, import, import_bytes,
    proto::{
        AttributeProto, Dimension, ElementTypeProto, Extent, FunctionProto, GraphProto, ModelProto, NodeProto,
        OperatorSetIdProto, SparseTensorProto, StringStringEntryProto, TensorProto, TensorShapeProto, TensorTypeProto,
        TypeProto, TypeValue, ValueInfoProto, attribute_type,
    },
};
use crate::{
    ops::{EvalContext, Inputs},
    passes::{PassOptions, declutter},
};
use prost::{Message, bytes::Bytes};
use std::fs;

const F32: i32 = 1;
const I64: i32 = 7;
const STRING: i32 = 8;
const BOOL: i32 = 9;

fn text(s: &str) -> String {
    s.to_string()
}

fn texts(list: &[&str]) -> Vec<String> {
    list.iter().map(|s| s.to_string()).collect()
}

fn node(name: &str, op_type: &str, input: &[&str], output: &[&str]) -> NodeProto {
    let (input, output) = (texts(input), texts(output));
    NodeProto { input, output, name: text(name), op_type: text(op_type), ..NodeProto::default() }
}

fn value(name: &str, dims: &[i64]) -> ValueInfoProto {
    let dim = dims.iter().map(|&d| Dimension { value: Some(Extent::Value(d)) }).collect();
    typed(name, TypeValue::Tensor(TensorTypeProto { elem_type: F32, shape: Some(TensorShapeProto { dim }) }))
}

fn typed(name: &str, value: TypeValue) -> ValueInfoProto {
    ValueInfoProto { name: text(name), r#type: Some(TypeProto { value: Some(value) }) }
}

fn raw(name: &str, data_type: i32, dims: &[i64], bytes: usize) -> TensorProto {
    let raw_data = Some(Bytes::from(vec![0; bytes]));
    TensorProto { name: text(name), data_type, dims: dims.to_vec(), raw_data, ..TensorProto::default() }
}

fn external(entries: &[(&str, &str)]) -> TensorProto {
    let entry = |(key, value): &(&str, &str)| StringStringEntryProto { key: text(key), value: text(value) };
    let external_data = entries.iter().map(entry).collect();
    TensorProto { raw_data: None, external_data, data_location: 1, ..raw("w", F32, &[4], 0) }
}

fn attribute(name: &str, r#type: i32) -> AttributeProto {
    AttributeProto { name: text(name), r#type, ..AttributeProto::default() }
}

fn int(name: &str, i: i64) -> AttributeProto {
    AttributeProto { i, ..attribute(name, attribute_type::INT) }
}

/// `x → Relu "act" → y`, with `w`, which nothing uses.
fn good() -> ModelProto {
    let graph = GraphProto {
        name: text("g"),
        node: vec![node("act", "Relu", &["x"], &["y"])],
        initializer: vec![raw("w", F32, &[2, 3], 24)],
        input: vec![value("x", &[2, 3])],
        output: vec![value("y", &[2, 3])],
        ..GraphProto::default()
    };
    let opset_import = vec![OperatorSetIdProto { domain: String::new(), version: 17 }];
    ModelProto { ir_version: 8, graph: Some(graph), opset_import, ..ModelProto::default() }
}

/// The good model, changed.
fn with(change: impl FnOnce(&mut GraphProto)) -> ModelProto {
    let mut model = good();
    change(model.graph.as_mut().unwrap());
    model
}

fn with_weight(weight: TensorProto) -> ModelProto {
    with(|g| g.initializer[0] = weight)
}

fn with_node(node: NodeProto) -> ModelProto {
    with(|g| g.node[0] = node)
}

fn with_attribute(attribute: AttributeProto) -> ModelProto {
    with(|g| g.node[0] = NodeProto { attribute: vec![attribute], ..node("act", "LeakyRelu", &["x"], &["y"]) })
}

#[track_caller]
fn refused(model: &ModelProto, options: &ImportOptions, fragments: &[&str]) {
    let error = match import_bytes(model.encode_to_vec().into(), None, options) {
        Ok(graph) => panic!("was read as {graph:?}, expected an error with {fragments:?}"),
        Err(error) => error.to_string(),
    };
    for fragment in fragments {
        assert!(error.contains(fragment), "'{error}' does not say '{fragment}'");
    }
}

#[track_caller]
fn check(model: ModelProto, fragments: &[&str]) {
    refused(&model, &ImportOptions::default(), fragments);
}

#[test]
fn the_good_model_is_read() {
    let graph = import_bytes(good().encode_to_vec().into(), None, &ImportOptions::default()).unwrap();
    assert_eq!((graph.node_count(), graph.inputs().len(), graph.outputs().len()), (1, 1, 1));
}

#[test]
fn tensors_that_lie_are_named() {
    check(with_weight(raw("w", F32, &[2, 3], 20)), &["'w'", "20 bytes", "f32", "[2, 3]", "24"]);
    check(with_weight(raw("w", F32, &[i64::MAX, i64::MAX], 24)), &["'w'", "overflow"]);
    check(with_weight(raw("w", F32, &[1 << 62, 1 << 2], 24)), &["'w'", "overflow"]);
    check(with_weight(raw("w", F32, &[i64::MAX / 4], 24)), &["'w'", "24 bytes"]);
    check(with_weight(raw("w", F32, &[2, -3], 24)), &["'w'", "negative", "-3"]);
    check(with_weight(raw("w", 99, &[2, 3], 24)), &["'w'", "data type 99"]);
    check(with_weight(raw("w", STRING, &[24], 24)), &["'w'", "strings"]);
    check(with_weight(raw("w", F32, &[1; 65], 4)), &["'w'", "rank", "65", "64"]);
    check(with_weight(raw("", F32, &[6], 24)), &["initializer", "no name"]);
    let claims = TensorProto { raw_data: None, float_data: vec![0.0; 5], ..raw("w", F32, &[1 << 40], 0) };
    check(with_weight(claims), &["'w'", "5 values in float_data", "1099511627776"]);
    let other_field = TensorProto { raw_data: None, float_data: vec![0.0; 6], ..raw("w", I64, &[6], 0) };
    check(with_weight(other_field), &["'w'", "int64_data", "6"]);
    let strings = vec![Bytes::from_static(b"\xff\xfe")];
    let strings = TensorProto { raw_data: None, string_data: strings, ..raw("w", STRING, &[1], 0) };
    check(with_weight(strings), &["'w'", "UTF-8"]);
    check(with_weight(TensorProto { data_location: 7, ..raw("w", F32, &[6], 24) }), &["'w'", "data location 7"]);
    check(with_weight(external(&[("location", "weights.bin")])), &["'w'", "weights.bin", "not read from a folder"]);
    check(
        with(|g| g.sparse_initializer = vec![SparseTensorProto::default()]),
        &["sparse initializer ''", "without values"],
    );
}

#[test]
fn external_data_stays_in_its_folder_and_its_file() {
    let outer = tempfile::tempdir().unwrap();
    let folder = outer.path().join("model");
    fs::create_dir(&folder).unwrap();
    fs::write(outer.path().join("secret.bin"), [0; 64]).unwrap();
    fs::write(folder.join("weights.bin"), [0; 24]).unwrap();
    fs::create_dir(folder.join("inner")).unwrap();
    let absolute = outer.path().join("secret.bin").display().to_string();
    let check = |entries: &[(&str, &str)], expected: &[&str]| {
        let path = folder.join("model.onnx");
        fs::write(&path, with_weight(external(entries)).encode_to_vec()).unwrap();
        for map in [true, false] {
            match (import(&path, &ImportOptions { map, ..ImportOptions::default() }), expected) {
                (Ok(_), []) => {}
                (Ok(_), _) => panic!("{entries:?} was read"),
                (Err(error), _) => {
                    let error = error.to_string();
                    assert!(!expected.is_empty(), "{entries:?}: {error}");
                    expected.iter().for_each(|e| assert!(error.contains(e), "{entries:?}: '{error}' without '{e}'"));
                }
            }
        }
    };
    check(&[("location", "weights.bin"), ("offset", "8"), ("length", "16")], &[]);
    check(&[("location", "./weights.bin")], &[]);
    check(&[("location", "inner/../weights.bin")], &["'w'", "outside the model's folder"]);
    check(&[("location", "../secret.bin")], &["'w'", "../secret.bin", "outside the model's folder"]);
    check(&[("location", &absolute)], &["'w'", "outside the model's folder"]);
    check(&[("location", "")], &["'w'", "outside the model's folder"]);
    check(&[], &["'w'", "without a location"]);
    check(&[("location", "absent.bin")], &["'w'", "absent.bin"]);
    check(&[("location", "inner")], &["inner", "not a regular file"]);
    check(&[("location", "weights\0.bin")], &["'w'"]);
    check(&[("location", "weights.bin"), ("offset", "9")], &["'w'", "bytes 9", "16", "24"]);
    check(&[("location", "weights.bin"), ("offset", "18446744073709551615")], &["'w'", "weights.bin", "24"]);
    check(&[("location", "weights.bin"), ("offset", "-1")], &["'w'", "offset", "-1"]);
    check(&[("location", "weights.bin"), ("length", "17")], &["'w'", "17 bytes", "16"]);
    check(&[("location", "weights.bin"), ("length", "lots")], &["'w'", "length", "lots"]);
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink(outer.path().join("secret.bin"), folder.join("link.bin")).unwrap();
        check(&[("location", "link.bin")], &["'w'", "link.bin", "outside the model's folder"]);
        std::os::unix::fs::symlink(outer.path(), folder.join("link")).unwrap();
        check(&[("location", "link/secret.bin")], &["'w'", "outside the model's folder"]);
        // A link that stays inside is as good as a file.
        std::os::unix::fs::symlink(folder.join("weights.bin"), folder.join("alias.bin")).unwrap();
        check(&[("location", "alias.bin")], &[]);
    }
}

#[test]
fn graphs_that_contradict_themselves_are_named() {
    let cycle = with(|g| g.node = vec![node("a", "Relu", &["z"], &["y"]), node("b", "Relu", &["y"], &["z"])]);
    check(cycle, &["cycle", "'a'"]);
    check(with_node(node("act", "Relu", &["y"], &["y"])), &["cycle", "'act'"]);
    check(with(|g| g.node.push(node("again", "Neg", &["x"], &["y"]))), &["'again'", "'y'", "made once"]);
    check(with_node(node("act", "Relu", &["x"], &["x"])), &["'act'", "'x'", "made once"]);
    check(with(|g| g.initializer.push(raw("w", F32, &[1], 4))), &["'w'", "another value"]);
    check(with(|g| g.input.push(value("x", &[1]))), &["input 'x'", "name of its own"]);
    check(with(|g| g.input.push(value("", &[1]))), &["input ''", "name of its own"]);
    check(with_node(node("act", "Relu", &["absent"], &["y"])), &["'act' (Relu)", "input 0", "'absent'"]);
    check(with_node(node("act", "Relu", &[], &["y"])), &["'act' (Relu)", "0 inputs"]);
    check(with_node(node("act", "Add", &["x"], &["y"])), &["'act' (Add)", "1 inputs", "2 expected"]);
    check(with_node(node("act", "Add", &["x", ""], &["y"])), &["'act' (Add)", "input 1"]);
    check(with_node(node("act", "Relu", &["x"], &[""])), &["'act'", "no output"]);
    check(with_node(node("act", "Relu", &["x"], &["y", "z"])), &["'act' (Relu)", "1 outputs, 2 are named"]);
    check(with(|g| g.output = vec![value("nowhere", &[1])]), &["output 'nowhere'", "nothing makes it"]);
    check(with(|g| g.output.clear()), &["'g'", "no outputs"]);
    check(ModelProto { graph: None, ..good() }, &["no graph"]);
    check(ModelProto::default(), &["not a"]);
    check(with(|g| g.input[0].r#type = None), &["input 'x'", "no type"]);
    check(with(|g| g.input[0].r#type = Some(TypeProto::default())), &["input 'x'", "no type"]);
    check(with(|g| g.input[0] = value("x", &[1; 65])), &["input 'x'", "rank", "65", "64"]);
    let strange = TensorTypeProto { elem_type: 77, shape: None };
    check(with(|g| g.input[0] = typed("x", TypeValue::Tensor(strange.clone()))), &["'x'", "element type 77"]);
    check(with(|g| g.input[0] = typed("x", TypeValue::SparseTensor(strange))), &["'x'", "sparse"]);
    let sequence = TypeValue::Sequence(Box::new(ElementTypeProto { elem_type: None }));
    check(with(|g| g.input[0] = typed("x", sequence)), &["'x'", "no type"]);
}

#[test]
fn operators_and_attributes_that_are_not_there_are_named() {
    check(with_node(node("act", "Relooo", &["x"], &["y"])), &["'act'", "Relooo", "opset 17"]);
    check(with_node(node("act", "RELU", &["x"], &["y"])), &["'act'", "RELU", "there is Relu"]);
    let elsewhere = NodeProto { domain: text("com.example"), ..node("act", "Relu", &["x"], &["y"]) };
    check(with_node(elsewhere.clone()), &["'act'", "com.example", "does not import"]);
    let import = |domain: &str, version| OperatorSetIdProto { domain: text(domain), version };
    let mut model = with_node(elsewhere);
    model.opset_import.push(import("com.example", 1));
    check(model.clone(), &["'act'", "com.example.Relu"]);
    let body = vec![node("again", "Relu", &["a"], &["b"])];
    let body = body.into_iter().map(|n| NodeProto { domain: text("com.example"), ..n }).collect();
    let function = FunctionProto {
        name: text("Relu"),
        domain: text("com.example"),
        input: vec![text("a")],
        output: vec![text("b")],
        opset_import: vec![import("com.example", 1)],
        node: body,
        ..FunctionProto::default()
    };
    model.functions.push(function.clone());
    check(model.clone(), &["'again' (Relu)", "recursive"]);
    model.functions.push(function);
    check(model.clone(), &["function 'com.example.Relu'", "twice"]);
    model.functions.truncate(1);
    model.functions[0].node.clear();
    check(model.clone(), &["function 'com.example.Relu'", "'b'", "nothing makes it"]);
    model.functions[0].input.clear();
    check(model, &["'act' (Relu)", "0 inputs"]);
    for version in [i64::MIN, 0, 29, i64::MAX] {
        let model = ModelProto { opset_import: vec![import("", version)], ..good() };
        check(model, &[&format!("opset {version}"), "1 to 28"]);
    }
    check(ModelProto { opset_import: vec![], ..good() }, &["no operator set"]);
    check(ModelProto { opset_import: vec![import("", 17), import("ai.onnx", 18)], ..good() }, &["17", "18"]);

    check(with_attribute(int("alpha", 1)), &["'act' (LeakyRelu)", "'alpha'", "a float"]);
    check(with_attribute(int("beta", 1)), &["'act' (LeakyRelu)", "'beta'", "does not define"]);
    check(with_attribute(attribute("alpha", 0)), &["'act'", "'alpha'", "type 0"]);
    check(with_attribute(attribute("alpha", 42)), &["'act'", "'alpha'", "type 42"]);
    let reference = AttributeProto { ref_attr_name: text("outer"), ..attribute("alpha", attribute_type::FLOAT) };
    check(with_attribute(reference), &["'act'", "'alpha'", "function"]);
    let bytes = AttributeProto { s: Bytes::from_static(b"\xc3\x28"), ..attribute("alpha", attribute_type::STRING) };
    check(with_attribute(bytes), &["'act'", "'alpha'", "UTF-8"]);
    check(with_attribute(attribute("alpha", attribute_type::TENSOR)), &["'act'", "'alpha'", "there is none"]);
    let tensor = Some(raw("", F32, &[3], 4));
    let tensor = AttributeProto { t: tensor, ..attribute("alpha", attribute_type::TENSOR) };
    check(with_attribute(tensor), &["'act'", "'alpha'", "4 bytes"]);
    let twice = NodeProto {
        attribute: vec![attribute("alpha", attribute_type::FLOAT), attribute("alpha", attribute_type::FLOAT)],
        ..node("act", "LeakyRelu", &["x"], &["y"])
    };
    check(with_node(twice), &["'act'", "'alpha' twice"]);
    let branch = AttributeProto { g: Some(GraphProto::default()), ..attribute("then_branch", attribute_type::GRAPH) };
    let branch = NodeProto { attribute: vec![branch], ..node("choice", "If", &["x"], &["y"]) };
    check(with_node(branch), &["'choice' (If)", "'else_branch'", "missing"]);
    check(with_node(node("c", "Constant", &[], &["y"])), &["'c' (Constant)", "one attribute"]);
    let odd = NodeProto { attribute: vec![int("value_float", 1)], ..node("c", "Constant", &[], &["y"]) };
    check(with_node(odd), &["'c' (Constant)", "'value_float'"]);
}

/// Attributes and constant inputs at the edge of their types, against operators that compute with them.
#[test]
fn extreme_numbers_are_refused_by_the_operator() {
    let extremes = [i64::MIN, i64::MIN + 1, -3, -1, 0, 1, 3, i64::from(i32::MAX), i64::MAX - 1, i64::MAX];
    let integers = |name: &str, values: &[i64]| TensorProto {
        raw_data: None,
        int64_data: values.to_vec(),
        ..raw(name, I64, &[values.len() as i64], 0)
    };
    let scalar =
        |name: &str, value: i64| TensorProto { raw_data: None, int64_data: vec![value], ..raw(name, I64, &[], 0) };
    let mut read = 0;
    let mut attempt = |op: &str, inputs: &[&str], attributes: Vec<AttributeProto>, a: i64, b: i64| {
        let model = with(|g| {
            g.initializer = vec![
                integers("a2", &[a, b]),
                integers("a1", &[a]),
                integers("b1", &[b]),
                scalar("a", a),
                scalar("b", b),
                scalar("one", 1),
            ];
            g.node = vec![NodeProto { attribute: attributes, ..node("n", op, inputs, &["y"]) }];
        });
        // Whatever it says, it says it as an error.
        read += usize::from(import_bytes(model.encode_to_vec().into(), None, &ImportOptions::default()).is_ok());
    };
    for a in extremes {
        for b in extremes {
            let ints = |name: &str, ints: &[i64]| AttributeProto {
                ints: ints.to_vec(),
                ..attribute(name, attribute_type::INTS)
            };
            attempt("Reshape", &["x", "a2"], vec![], a, b);
            attempt("Expand", &["x", "a2"], vec![], a, b);
            attempt("Tile", &["x", "a2"], vec![], a, b);
            attempt("ConstantOfShape", &["a2"], vec![], a, b);
            attempt("Unsqueeze", &["x", "a2"], vec![], a, b);
            attempt("Squeeze", &["x", "a2"], vec![], a, b);
            attempt("Split", &["x", "a2"], vec![], a, b);
            attempt("Slice", &["x", "a1", "b1"], vec![], a, b);
            attempt("Slice", &["x", "a2", "a2", "a2", "a2"], vec![], a, b);
            attempt("Slice", &["x", "b1", "a1", "a1", "b1"], vec![], a, b);
            attempt("Range", &["a", "b", "one"], vec![], a, b);
            attempt("Range", &["one", "a", "b"], vec![], a, b);
            attempt("Gather", &["x", "a2"], vec![int("axis", b)], a, b);
            attempt("Gather", &["a2", "a1"], vec![], a, b);
            attempt("GatherElements", &["x", "a2"], vec![int("axis", b)], a, b);
            attempt("Concat", &["x", "x"], vec![int("axis", a)], a, b);
            attempt("Flatten", &["x"], vec![int("axis", a)], a, b);
            attempt("Shape", &["x"], vec![int("start", a), int("end", b)], a, b);
            attempt("Transpose", &["x"], vec![ints("perm", &[a, b])], a, b);
            attempt("Softmax", &["x"], vec![int("axis", a)], a, b);
            attempt("Cast", &["x"], vec![int("to", a)], a, b);
            attempt("Div", &["a2", "b1"], vec![], a, b);
            attempt("Mul", &["a2", "b1"], vec![], a, b);
            attempt("Neg", &["a2"], vec![], a, b);
            attempt("MaxPool", &["x"], vec![ints("kernel_shape", &[a]), ints("strides", &[b])], a, b);
            attempt("MaxPool", &["x"], vec![ints("kernel_shape", &[1]), ints("pads", &[a, b])], a, b);
            attempt("Pad", &["x", "a2", "", "b1"], vec![], a, b);
            attempt("TopK", &["x", "a1"], vec![int("axis", b)], a, b);
            attempt("OneHot", &["a2", "b", "a2"], vec![int("axis", a)], a, b);
            attempt("DepthToSpace", &["x"], vec![int("blocksize", a)], a, b);
            attempt("CumSum", &["x", "a"], vec![], a, b);
            attempt("Trilu", &["x", "a"], vec![], a, b);
        }
    }
    assert!(read > 100, "only {read} of them are valid: the table lost its point");
}

#[test]
fn limits_are_kept() {
    let limit = |limits: Limits, model: ModelProto, fragments: &[&str]| {
        refused(&model, &ImportOptions { limits, ..ImportOptions::default() }, fragments);
    };
    let chain = |count: usize| {
        with(|g| {
            g.node = (0..count)
                .map(|i| {
                    let input = if i == 0 { text("x") } else { format!("v{}", i - 1) };
                    let output = if i + 1 == count { text("y") } else { format!("v{i}") };
                    node(&format!("n{i}"), "Relu", &[&input], &[&output])
                })
                .collect();
        })
    };
    limit(Limits { nodes: 3, ..Limits::default() }, chain(4), &["'g'", "number of nodes", "4", "3"]);
    limit(Limits { values: 5, ..Limits::default() }, chain(4), &["'g'", "number of values", "10", "5"]);
    let deep = || with(|g| *g = loops(3));
    limit(Limits { depth: 2, ..Limits::default() }, deep(), &["'loop0'", "the depth of graphs in nodes", "3", "2"]);
    limit(Limits { rank: 1, ..Limits::default() }, good(), &["'w'", "rank", "2", "1"]);
    let long = with_node(node(&"n".repeat(100), "Relu", &["x"], &["y"]));
    limit(Limits { name_bytes: 99, ..Limits::default() }, long, &["length of a name", "100", "99"]);

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.onnx");
    fs::write(&path, good().encode_to_vec()).unwrap();
    let small = ImportOptions { limits: Limits { file_bytes: 10, ..Limits::default() }, ..ImportOptions::default() };
    let error = import(&path, &small).unwrap_err().to_string();
    assert!(error.contains("model.onnx") && error.contains("size in bytes"), "{error}");
    let error = import(folder.path(), &small).unwrap_err().to_string();
    assert!(error.contains("regular file"), "{error}");
}

/// Loops in loops, so many deep, of a million iterations each: `v → y`, both of no known extent.
fn loops(depth: usize) -> GraphProto {
    let of = |level: usize, name: &str| format!("{name}{level}");
    let scalar = |name: String, elem_type: i32| {
        let shape = Some(TensorShapeProto { dim: Vec::new() });
        typed(&name, TypeValue::Tensor(TensorTypeProto { elem_type, shape }))
    };
    let carried = |level: usize| if level == depth { text("x") } else { of(level, "v") };
    let made = |level: usize| if level == depth { text("y") } else { of(level, "w") };
    let mut graph = None;
    for level in 0..=depth {
        let node = match graph.take() {
            None => node("same", "Identity", &[&carried(level)], &[&made(level)]),
            Some(body) => {
                let body = AttributeProto { g: Some(body), ..attribute("body", attribute_type::GRAPH) };
                let inputs = ["million", "", &carried(level)];
                NodeProto { attribute: vec![body], ..node(&of(level, "loop"), "Loop", &inputs, &[&made(level)]) }
            }
        };
        let (condition, goes_on) = (of(level, "condition"), of(level, "goes_on"));
        let mut body = GraphProto { name: of(level, "loop"), node: vec![node], ..GraphProto::default() };
        if level < depth {
            body.node.push(self::node("", "Identity", &[&condition], &[&goes_on]));
            body.input.extend([scalar(of(level, "trip"), I64), scalar(condition, BOOL)]);
            body.output.push(scalar(goes_on, BOOL));
        } else {
            let million = 1_000_000i64.to_le_bytes().to_vec();
            body.initializer.push(TensorProto { raw_data: Some(million.into()), ..raw("million", I64, &[], 0) });
        }
        body.input.push(scalar(carried(level), F32));
        body.output.push(scalar(made(level), F32));
        graph = Some(body);
    }
    graph.unwrap_or_default()
}

#[test]
fn loops_in_loops_count_together() {
    let mut graph = loops(4);
    // A constant to carry: everything might be folded.
    graph.input.clear();
    graph.initializer.push(raw("x", F32, &[], 4));
    // What makes an output is not folded.
    graph.node.push(node("last", "Relu", &["y"], &["z"]));
    graph.output = vec![value("z", &[])];
    let model = with(|g| *g = graph);
    let graph = import_bytes(model.encode_to_vec().into(), None, &ImportOptions::default()).unwrap();
    let (graph, _) = declutter(graph, &PassOptions::default()).unwrap();
    let (_, node) = graph.nodes().find(|(_, node)| node.name == "loop4").expect("too many iterations to be folded");
    let inputs = node.inputs.iter().map(|input| {
        input.and_then(|id| graph.constant(id)).map(|constant| cutover_tensor::Value::Tensor(constant.tensor.clone()))
    });
    let inputs: Vec<Option<cutover_tensor::Value>> = inputs.collect();
    let inputs: Vec<Option<&cutover_tensor::Value>> = inputs.iter().map(Option::as_ref).collect();
    let context = EvalContext { max_trips: 10_000, ..EvalContext::default() };
    let error = node.op.eval(Inputs(&inputs), &context).unwrap_err().to_string();
    assert!(error.contains("a loop of more than 10000 iterations"), "{error}");
}

/// One name for every node, and no name for most outputs: fresh names must not be searched for from the start each time.
#[test]
fn many_equal_names_take_linear_time() {
    let model = with(|g| {
        g.node = (0..20_000)
            .map(|i| {
                let input = if i == 0 { text("x") } else { format!("v{}", i - 1) };
                let output = if i == 19_999 { text("y") } else { format!("v{i}") };
                node("same", "Identity", &[&input], &[&output])
            })
            .collect();
    });
    let graph = import_bytes(model.encode_to_vec().into(), None, &ImportOptions::default()).unwrap();
    assert_eq!(graph.nodes().last().unwrap().1.name, "same.19999");
}

/// Expressions of extents that double, square or nest with every node stay small.
#[test]
fn extents_that_grow_with_every_node_stay_bounded() {
    let grow = |op: &str, inputs: fn(&str) -> Vec<String>, count: usize| {
        let model = with(|g| {
            let dim = |name: &str| Dimension { value: Some(Extent::Parameter(text(name))) };
            let shape = Some(TensorShapeProto { dim: vec![dim("A"), dim("B")] });
            g.input = vec![typed("x", TypeValue::Tensor(TensorTypeProto { elem_type: F32, shape }))];
            let small = TensorProto { raw_data: None, int64_data: vec![7, 3], ..raw("three", I64, &[2], 0) };
            g.initializer = vec![small];
            let mut nodes = vec![node("s", "Shape", &["x"], &["v"]), node("first", "Add", &["v", "three"], &["v0"])];
            for i in 0..count {
                let inputs = inputs(&format!("v{i}"));
                let inputs: Vec<&str> = inputs.iter().map(String::as_str).collect();
                nodes.push(node(&format!("n{i}"), op, &inputs, &[&format!("v{}", i + 1)]));
            }
            nodes.push(node("e", "ConstantOfShape", &[&format!("v{count}")], &["y"]));
            g.node = nodes;
        });
        import_bytes(model.encode_to_vec().into(), None, &ImportOptions::default()).unwrap();
    };
    grow("Mul", |v| vec![text(v), text(v)], 60);
    grow("Add", |v| vec![text(v), text(v)], 100);
    grow("Div", |v| vec![text(v), text("three")], 20_000);
    grow("Min", |v| vec![text(v), text("three")], 20_000);
    grow("Mul", |v| vec![text(v), text("v0")], 2_000);
}

#[test]
fn a_file_cut_short_anywhere_is_refused_or_whole() {
    let bytes = with(|g| g.node[0].attribute = vec![]).encode_to_vec();
    let whole = import_bytes(bytes.clone().into(), None, &ImportOptions::default()).unwrap();
    for len in 0..bytes.len() {
        // Cut between two fields a file is valid protobuf; what is left may even be a graph, but not one with more than was there.
        if let Ok(graph) = import_bytes(Bytes::copy_from_slice(&bytes[..len]), None, &ImportOptions::default()) {
            assert!(graph.node_count() <= whole.node_count());
        }
    }
    let error = import_bytes(Bytes::new(), None, &ImportOptions::default()).unwrap_err().to_string();
    assert!(error.contains("empty"), "{error}");
}

#[test]
fn names_and_lengths_that_are_no_text_or_no_length_are_refused() {
    let bytes = good().encode_to_vec();
    let at = bytes.windows(3).position(|w| w == b"act").unwrap();
    let mut not_text = bytes.clone();
    not_text[at] = 0xff;
    let mut longer = bytes.clone();
    longer[at - 1] = 0x7f;
    for (file, fragment) in [(not_text, "UTF-8"), (longer, "not a valid ONNX file"), (vec![0xff; 64], "varint")] {
        let error = import_bytes(file.into(), None, &ImportOptions::default()).unwrap_err().to_string();
        assert!(error.contains(fragment), "'{error}' does not say '{fragment}'");
    }
    // A type inside a type inside a type: decoding has a depth at which it stops.
    let mut nested = TypeProto { value: Some(TypeValue::Tensor(TensorTypeProto { elem_type: F32, shape: None })) };
    for _ in 0..200 {
        let of = ElementTypeProto { elem_type: Some(Box::new(nested)) };
        nested = TypeProto { value: Some(TypeValue::Sequence(Box::new(of))) };
    }
    check(with(|g| g.input[0].r#type = Some(nested)), &["not a valid ONNX file", "recursion"]);
}

#[test]
fn operands_of_before_opset_7_begin_at_their_axis() {
    let old = |op_type: &str, axis: i64, second: &[i64]| {
        let attribute = vec![int("broadcast", 1), int("axis", axis)];
        let mut model = with(|g| {
            g.node[0] = NodeProto { attribute, ..node("sum", op_type, &["x", "z"], &["y"]) };
            g.input = vec![value("x", &[2, 3, 4, 5]), value("z", second)];
            g.output = vec![value("y", &[2, 3, 4, 5])];
        });
        model.opset_import[0].version = 6;
        model
    };
    for (axis, second) in [(1, &[3, 4][..]), (0, &[2]), (-1, &[5]), (2, &[4, 5]), (3, &[])] {
        let model = old("Add", axis, second).encode_to_vec();
        let graph = import_bytes(model.into(), None, &ImportOptions::default()).unwrap();
        let shape = graph.value(graph.outputs()[0]).fact.as_tensor().unwrap().constant_shape();
        assert_eq!(shape, Some(vec![2, 3, 4, 5]), "{second:?} at axis {axis}");
    }
    check(old("Add", 3, &[4, 5]), &["'sum' (Add)", "of 2 axes cannot meet axis 3 of 4"]);
    check(old("Add", i64::MIN, &[4]), &["'sum' (Add)", "cannot meet axis"]);
    check(old("Add", i64::MAX, &[4]), &["'sum' (Add)", "cannot meet axis"]);
}

#[test]
fn gradients_that_cannot_be_are_refused() {
    let gradient = |attributes: &[(&str, &[&str])], inputs: &[&str], outputs: &[&str]| {
        let strings = |(name, names): &(&str, &[&str])| AttributeProto {
            strings: names.iter().map(|name| Bytes::copy_from_slice(name.as_bytes())).collect(),
            ..attribute(name, attribute_type::STRINGS)
        };
        let domain = "ai.onnx.preview.training";
        let node = NodeProto {
            domain: text(domain),
            attribute: attributes.iter().map(strings).collect(),
            ..node("slope", "Gradient", inputs, outputs)
        };
        let mut model = with(|g| {
            g.node.push(node);
            g.output.push(value("dx", &[2, 3]));
        });
        model.opset_import.push(OperatorSetIdProto { domain: text(domain), version: 1 });
        model
    };
    let good = gradient(&[("xs", &["x"]), ("y", &["y"])], &["x"], &["dx"]).encode_to_vec();
    assert!(import_bytes(good.into(), None, &ImportOptions::default()).is_ok());
    check(gradient(&[("xs", &["x"])], &["x"], &["dx"]), &["'slope'", "'y' must name"]);
    check(gradient(&[("xs", &["x"]), ("y", &["q"])], &["x"], &["dx"]), &["'slope'", "'q'", "nothing makes"]);
    check(gradient(&[("xs", &["x"]), ("y", &["dx"])], &["x"], &["dx"]), &["cycle", "slope"]);
    check(gradient(&[("xs", &["x", "x"]), ("y", &["y"])], &["x", "x"], &["dx"]), &["'slope'", "'x' twice"]);
    check(gradient(&[("xs", &["x"]), ("y", &["y"])], &[], &["dx"]), &["'slope'", "0 inputs"]);
    check(gradient(&[("xs", &["x"]), ("y", &["y"]), ("w", &[])], &["x"], &["dx"]), &["'slope'", "'w'"]);
}
