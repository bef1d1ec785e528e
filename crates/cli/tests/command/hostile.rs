//! Files that are broken or lie: an error that says what and where, within bounded memory, and never a panic.

use crate::{Folder, arguments, conformance, cutover, digits};

fn npy(header: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((header.len() as u16).to_le_bytes());
    bytes.extend(header.as_bytes());
    bytes.extend(data);
    bytes
}

/// An archive of one stored entry, `image.npy`, whose headers claim `size` bytes.
fn npz(content: &[u8], size: u32) -> Vec<u8> {
    let name = b"image.npy";
    let sizes = |bytes: &mut Vec<u8>| {
        bytes.extend(0u32.to_le_bytes());
        bytes.extend(size.to_le_bytes());
        bytes.extend(size.to_le_bytes());
        bytes.extend((name.len() as u16).to_le_bytes());
    };
    let mut bytes = b"PK\x03\x04\x14\x00\x00\x00\x00\x00\x00\x00\x00\x00".to_vec();
    sizes(&mut bytes);
    bytes.extend([0; 2]);
    bytes.extend(name);
    bytes.extend(content);
    let directory_at = bytes.len() as u32;
    bytes.extend(b"PK\x01\x02\x14\x00\x14\x00\x00\x00\x00\x00\x00\x00\x00\x00");
    sizes(&mut bytes);
    bytes.extend([0; 16]);
    bytes.extend(name);
    let directory_size = bytes.len() as u32 - directory_at;
    bytes.extend(b"PK\x05\x06\x00\x00\x00\x00\x01\x00\x01\x00");
    bytes.extend(directory_size.to_le_bytes());
    bytes.extend(directory_at.to_le_bytes());
    bytes.extend([0; 2]);
    bytes
}

#[test]
fn broken_models_are_refused_by_every_command() {
    let folder = Folder::new();
    let model = std::fs::read(conformance("mobile.onnx")).unwrap();
    folder.write("empty.onnx", []);
    folder.write("text.onnx", "this is no model");
    folder.write("zeros.onnx", [0; 4096]);
    folder.write("half.onnx", &model[..model.len() / 2]);
    folder.write("tail.onnx", &model[..model.len() - 1]);
    folder.write("empty.cutover", []);
    folder.write("text.cutover", "this is no package");
    std::fs::create_dir(folder.path("folder.cutover")).unwrap();
    std::fs::create_dir(folder.path("folder.onnx")).unwrap();
    let inputs = conformance("mobile.in.npz");
    let files = [
        "empty.onnx",
        "text.onnx",
        "zeros.onnx",
        "half.onnx",
        "tail.onnx",
        "empty.cutover",
        "text.cutover",
        "folder.cutover",
        "folder.onnx",
        "missing.onnx",
        "missing.cutover",
    ];
    for file in files {
        let path = folder.path(file);
        cutover(arguments!["inspect", &path]).refuses(&[]);
        cutover(arguments!["run", &path, "--inputs", &inputs]).refuses(&[]);
        cutover(arguments!["verify", &path, "--inputs", &inputs, "--expect", &inputs]).refuses(&[]);
        cutover(arguments!["bench", &path, "--seconds", "0.01"]).refuses(&[]);
        cutover(arguments!["convert", &path, "-o", folder.path("out.cutover")]).refuses(&[]);
        cutover(arguments!["unpack", &path, "-o", folder.path("out")]).refuses(&[]);
        cutover(arguments!["serve", &path, "--listen", "127.0.0.1:0"]).refuses(&[]);
        cutover(arguments!["deploy", "digits", &path, "--store", folder.path("store")]).refuses(&[]);
    }
    // Weights that lie beside the model are part of it.
    let lone = folder.write("lone.onnx", std::fs::read(digits("v1")).unwrap());
    cutover(arguments!["inspect", &lone]).refuses(&["weights.safetensors"]);
    folder.write("weights.safetensors", [1, 2, 3]);
    cutover(arguments!["inspect", &lone]).refuses(&["weights.safetensors"]);
}

#[test]
fn a_model_cut_anywhere_is_an_error() {
    let folder = Folder::new();
    let model = std::fs::read(conformance("recurrent.onnx")).unwrap();
    for part in 1..12 {
        let path = folder.write("cut.onnx", &model[..model.len() * part / 12]);
        cutover(arguments!["inspect", &path]).refuses(&[]);
    }
}

#[test]
fn broken_tensors_are_refused_by_name() {
    let folder = Folder::new();
    let header = |descr: &str, order: &str, shape: &str| {
        format!("{{'descr': '{descr}', 'fortran_order': {order}, 'shape': {shape}, }}\n")
    };
    let image = |shape: &str, data: usize| npy(&header("<f4", "False", shape), &vec![0; data]);
    let whole = image("(1, 1, 8, 8)", 256);
    let cases: Vec<(&str, Vec<u8>, &[&str])> = vec![
        ("empty.npz", vec![], &["empty.npz"]),
        ("text.npz", b"PK\x03\x04 but no more".to_vec(), &["text.npz"]),
        ("larger.npz", npz(&whole, 0xFFFF_FFF0), &["larger.npz"]),
        ("smaller.npz", npz(&whole, 100), &["smaller.npz"]),
        ("short.npz", npz(&image("(1, 1, 8, 8)", 255), whole.len() as u32 - 1), &["short.npz"]),
        ("empty.npy", vec![], &["empty.npy", "not a valid .npy"]),
        ("short.npy", whole[..whole.len() - 1].to_vec(), &["short.npy", "256 bytes"]),
        ("long.npy", [whole.as_slice(), &[0]].concat(), &["long.npy", "256 bytes"]),
        ("huge.npy", image("(4000000000, 4000000000)", 16), &["huge.npy"]),
        ("large.npy", image("(1, 1, 8, 800000000)", 16), &["large.npy"]),
        ("overflow.npy", image("(99999999999999999999,)", 16), &["overflow.npy"]),
        ("negative.npy", image("(-1, 1, 8, 8)", 256), &["negative.npy"]),
        ("header.npy", b"\x93NUMPY\x02\x00\xff\xff\xff\xff{".to_vec(), &["header.npy", "not a valid .npy"]),
        ("fortran.npy", npy(&header("<f4", "True", "(1, 1, 8, 8)"), &[0; 256]), &["Fortran", "ascontiguousarray"]),
        ("big.npy", npy(&header(">f4", "False", "(1, 1, 8, 8)"), &[0; 256]), &["big-endian"]),
        ("complex.npy", npy(&header("<c8", "False", "(1,)"), &[0; 8]), &["<c8"]),
        ("object.npy", npy(&header("|O", "False", "(1,)"), &[0; 8]), &["objects that are not all texts"]),
        ("scalar.npy", image("()", 4), &["'image'", "f32[]"]),
        ("empty.safetensors", vec![], &["empty.safetensors"]),
        ("lies.safetensors", [&u64::MAX.to_le_bytes()[..], b"{}"].concat(), &["lies.safetensors"]),
        ("empty.json", vec![], &["empty.json"]),
        ("list.json", b"[1, 2]".to_vec(), &["list.json", "object of tensors by name"]),
        ("ragged.json", br#"{"image": [[1, 2], [3]]}"#.to_vec(), &["'image'", "different lengths"]),
        ("mixed.json", br#"{"image": [1, [2]]}"#.to_vec(), &["'image'"]),
        ("text.json", br#"{"image": ["a"]}"#.to_vec(), &["'image'", "element 0"]),
        ("dtype.json", br#"{"image": {"dtype": "f31", "data": [1]}}"#.to_vec(), &["'image'", "f31"]),
        ("data.json", br#"{"image": {"shape": [1]}}"#.to_vec(), &["'image'", "'data'"]),
        (
            "shape.json",
            br#"{"image": {"shape": [99999999999, 99999999999], "data": [1]}}"#.to_vec(),
            &["'image'", "1 elements"],
        ),
        ("sign.json", br#"{"image": {"shape": [-1], "data": [1]}}"#.to_vec(), &["'image'", "'shape'"]),
        ("deep.json", [b"{\"image\": ".to_vec(), vec![b'['; 100_000]].concat(), &["deep.json", "recursion"]),
        ("image.bin", whole.clone(), &["image.bin", ".npz"]),
    ];
    for (name, content, parts) in cases {
        let path = folder.write(name, content);
        cutover(arguments!["run", digits("v1"), "--inputs", &path]).refuses(parts);
        cutover(arguments!["convert", digits("v1"), "-o", folder.path("out.cutover"), "--golden", &path])
            .refuses(parts);
    }
    let good = folder.write("good.npy", &whole);
    cutover(arguments!["run", digits("v1"), "--inputs", &good]).done();
    std::fs::create_dir(folder.path("folder.npz")).unwrap();
    for name in ["folder.npz", "missing.npz"] {
        cutover(arguments!["verify", digits("v1"), "--inputs", &good, "--expect", folder.path(name)]).refuses(&[name]);
    }
}

/// `[1]` followed by the length and `bytes`: a field of a protobuf message.
pub(crate) fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
    [&[number << 3 | 2][..], &varint(bytes.len() as u64), bytes].concat()
}

fn varint(mut value: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
    bytes
}

/// A model of one `node`, from `x [dims]` to `y`, of f32, with the initializers given.
pub(crate) fn model(node: &[Vec<u8>], dims: &[u64], initializers: &[Vec<u8>]) -> Vec<u8> {
    let info = |name: &str, dims: Option<&[u64]>| {
        let dims = dims.into_iter().flatten().map(|&d| field(1, &[vec![8], varint(d)].concat()));
        let shape = field(2, &dims.collect::<Vec<_>>().concat());
        let tensor = field(1, &[vec![8, 1], shape].concat());
        [field(1, name.as_bytes()), field(2, &tensor)].concat()
    };
    let y = [field(1, b"y"), field(2, &field(1, &[8, 1]))].concat();
    let mut graph = [field(1, &node.concat()), field(2, b"g")].concat();
    initializers.iter().for_each(|tensor| graph.extend(field(5, tensor)));
    graph.extend([field(11, &info("x", Some(dims))), field(12, &y)].concat());
    [vec![8, 8], field(7, &graph), field(8, &[16, 17])].concat()
}

#[test]
fn shapes_that_a_model_claims_are_not_allocated() {
    let folder = Folder::new();
    let relu = [field(1, b"x"), field(2, b"y"), field(4, b"Relu")];
    let relu = folder.write("relu.onnx", model(&relu, &[1 << 20, 1 << 20], &[]));
    cutover(arguments!["inspect", &relu]).done().says(&["f32[1048576, 1048576]"]);
    cutover(arguments!["bench", &relu, "--seconds", "0.01"]).refuses(&["'x'", "bytes"]);
    cutover(arguments!["convert", &relu, "-o", folder.path("out.cutover")]).refuses(&["'x'", "bytes"]);

    // An initializer of 2⁴⁰ elements with four bytes of data.
    let claims = [vec![8], varint(1 << 40), vec![16, 1], field(8, b"w"), field(9, &[0; 4])].concat();
    let add = [field(1, b"x"), field(1, b"w"), field(2, b"y"), field(4, b"Add")];
    let add = folder.write("add.onnx", model(&add, &[1], &[claims]));
    cutover(arguments!["inspect", &add]).refuses(&["'w'"]);

    // Four bytes that expand to 2⁴⁰ elements when run.
    let sizes = (1u64 << 20).to_le_bytes().repeat(2);
    let shape = [vec![8, 2, 16, 7], field(8, b"s"), field(9, &sizes)].concat();
    let expand = [field(1, b"x"), field(1, b"s"), field(2, b"y"), field(4, b"Expand")];
    let expand = folder.write("expand.onnx", model(&expand, &[1], &[shape]));
    cutover(arguments!["inspect", &expand]).done();
    let inputs = folder.write("x.json", r#"{"x": [1]}"#);
    for backend in ["cpu", "reference"] {
        cutover(arguments!["run", &expand, "--inputs", &inputs, "--backend", backend]).refuses(&[]);
    }
}
