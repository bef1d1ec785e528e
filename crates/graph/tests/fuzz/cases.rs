//! The cases that files and nodes are made from.

use super::{options, random::Random, wire::Message};
use cutover_graph::{
    Fact,
    onnx::{import_bytes, read_value},
    ops::OPERATOR_NAMES,
};
use cutover_tensor::Value;
use std::{
    collections::BTreeMap,
    fs::File,
    io::Read,
    path::{Component, Path},
};

pub struct Case {
    pub name: String,
    pub model: Message,
    /// For each input of the graph its fact and its value.
    pub inputs: Vec<(Fact, Value)>,
}

pub struct Cases {
    pub all: Vec<Case>,
    /// Indices by the operator of the first node; single nodes first of all.
    by_operator: BTreeMap<String, Vec<usize>>,
    operators: Vec<String>,
    /// Attributes by name, as they are in any case.
    pub attributes: Vec<(String, Message)>,
    pub strings: Vec<String>,
}

impl Cases {
    pub fn load() -> Cases {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/onnx/onnx-1.23.2-node.tar.zst");
        let archive = ruzstd::decoding::StreamingDecoder::new(File::open(path).unwrap()).unwrap();
        let mut files: BTreeMap<String, BTreeMap<String, Vec<u8>>> = BTreeMap::new();
        for entry in tar::Archive::new(archive).entries().unwrap() {
            let mut entry = entry.unwrap();
            let path = entry.path().unwrap().into_owned();
            let parts: Vec<&str> = (path.components())
                .filter_map(|part| if let Component::Normal(part) = part { part.to_str() } else { None })
                .collect();
            if let [_, case, file @ ..] = parts.as_slice() {
                let (case, file) = (case.to_string(), file.join("/"));
                let mut bytes = Vec::new();
                entry.read_to_end(&mut bytes).unwrap();
                files.entry(case).or_default().insert(file, bytes);
            }
        }
        let mut cases = Cases {
            all: Vec::new(),
            by_operator: BTreeMap::new(),
            operators: OPERATOR_NAMES.iter().map(|name| name.to_string()).collect(),
            attributes: Vec::new(),
            strings: vec![String::new()],
        };
        files.into_iter().for_each(|(name, files)| cases.add(name, &files));
        assert!(cases.all.len() > 1000, "the archive has cases that are read");
        cases
    }

    fn add(&mut self, name: String, files: &BTreeMap<String, Vec<u8>>) {
        let Some(bytes) = files.get("model.onnx").filter(|bytes| bytes.len() < 1 << 16) else { return };
        let Some(model) = Message::parse(bytes) else { return };
        // Even what is not read yet says how an operator is spelled.
        let inputs = import_bytes(bytes.clone().into(), None, &options()).ok().and_then(|graph| {
            let read = |(at, &id): (usize, &cutover_graph::ValueId)| {
                let bytes =
                    files.get(&format!("test_data_set_0/input_{at}.pb")).filter(|bytes| bytes.len() < 1 << 16)?;
                let fact = graph.value(id).fact.clone();
                let value = read_value(bytes.clone().into(), &fact, &options()).ok()?;
                Some((fact, value))
            };
            graph.inputs().iter().enumerate().map(read).collect::<Option<Vec<_>>>()
        });
        let Some(inputs) = inputs else { return };
        let nodes: Vec<Message> = model.messages(7).iter().flat_map(|graph| graph.messages(1)).collect();
        for node in &nodes {
            for attribute in node.messages(5) {
                self.strings.extend(attribute.bytes(4).map(|text| String::from_utf8_lossy(text).into_owned()));
                self.attributes.push((operator(node), attribute));
            }
        }
        if let Some(first) = nodes.first() {
            let of = if nodes.len() == 1 { operator(first) } else { format!("{} and more", operator(first)) };
            self.by_operator.entry(of).or_default().push(self.all.len());
        }
        self.all.push(Case { name, model, inputs });
    }

    /// Any case, every first operator as often as another.
    pub fn pick(&self, random: &mut Random) -> &Case {
        let operators: Vec<&Vec<usize>> = self.by_operator.values().collect();
        let of = random.of(&operators);
        &self.all[*random.of(of)]
    }

    /// An operator, and a case of it if there is one.
    pub fn pick_operator(&self, random: &mut Random) -> (&str, Option<&Case>) {
        let name = random.of(&self.operators);
        let case = self.by_operator.get(name).map(|of| &self.all[*random.of(of)]);
        (name, case)
    }
}

/// `Name`, or `domain.Name`.
pub fn operator(node: &Message) -> String {
    let domain = node.text(7);
    if domain.is_empty() || domain == "ai.onnx" { node.text(4) } else { format!("{domain}.{}", node.text(4)) }
}

/// An integer that is likely to matter.
pub fn integer(random: &mut Random) -> i64 {
    match random.below(8) {
        0 => *random.of(&[i64::MIN, i64::MAX, i64::MIN + 1, 1 << 62, -1 << 62, 1 << 32, 1 << 31, -1 << 31, 1 << 16]),
        1 => random.next() as i64,
        2 => random.below(1000) as i64 - 500,
        3 | 4 => random.below(8) as i64 - 4,
        _ => random.below(4) as i64,
    }
}

pub fn float(random: &mut Random) -> f32 {
    match random.below(6) {
        0 => *random.of(&[f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN_POSITIVE, -0.0, 1e30, -1e30]),
        1 => f32::from_bits(random.next() as u32),
        _ => random.below(64) as f32 / 8.0 - 4.0,
    }
}
