//! From a graph to the messages, and to files.

use super::{
    proto::{
        AttributeProto, Dimension, ElementTypeProto, Extent, GraphProto, MapTypeProto, ModelProto, NodeProto,
        OperatorSetIdProto, SparseTensorProto, StringStringEntryProto, TensorProto, TensorShapeProto, TensorTypeProto,
        TypeProto, TypeValue, ValueInfoProto, attribute_type,
    },
    safetensors,
};
use crate::{
    Constant, Dim, Fact, Graph, GraphError, NodeId, Source, TensorFact, ValueId,
    ops::{Attribute, EXPORT_OPSET, Spelling, Subgraph},
};
use cutover_tensor::{DType, Tensor};
use prost::{Message, bytes::Bytes};
use std::{
    collections::{BTreeSet, HashMap},
    fs::File,
    io::{self, BufWriter, Write},
    path::Path,
};

/// IR version of opset 21.
const IR_VERSION: i64 = 10;
/// That of opset 23 and later.
const NEWER_IR_VERSION: i64 = 11;
/// Tensors below this stay in the model file even when weights go to another: shapes, axes, bounds.
const INLINE_BYTES: usize = 256;

/// Where the weights go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Weights {
    /// Into the model file.
    Inline,
    /// Into the model file, and those of floats that take fewer bytes so as sparse initializers: of f32, that is where two thirds are zero.
    Sparse,
    /// As external data into a safetensors file beside it.
    Safetensors { file_name: String },
}

/// Why a graph could not be written.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    #[error("cannot write {path}: {source}")]
    Io { path: String, source: io::Error },
    #[error("node '{node}': {message}")]
    Node { node: String, message: String },
    #[error("the weights' file name '{0}' must be a plain file name")]
    FileName(String),
    /// Protobuf ends at 2 GiB.
    #[error("the model takes {bytes} bytes, above protobuf's 2 GiB: write the weights to a file of their own")]
    TooLarge { bytes: usize },
    #[error(transparent)]
    Graph(#[from] GraphError),
}

/// Writes `graph` to `path` at opset [`EXPORT_OPSET`]: fused operators as the standard nodes they were made of, values under the
/// names they have.
///
/// # Errors
/// A file that can't be written; an operator of the user's own, which has no ONNX spelling, or a form that newer opsets dropped.
pub fn export(graph: &Graph, path: &Path, weights: &Weights) -> Result<(), ExportError> {
    let io = |path: &Path, source| ExportError::Io { path: path.display().to_string(), source };
    let mut writer = Writer::new(graph)?;
    writer.sparse = *weights == Weights::Sparse;
    if let Weights::Safetensors { file_name } = weights {
        if Path::new(file_name).file_name().and_then(|n| n.to_str()) != Some(file_name) {
            return Err(ExportError::FileName(file_name.clone()));
        }
        let target = path.with_file_name(file_name);
        let large = |t: &&(String, Tensor)| t.1.bytes().len() >= INLINE_BYTES && t.1.dtype() != DType::String;
        let external: Vec<(String, &Tensor)> =
            writer.weights.iter().filter(large).map(|(name, tensor)| (name.clone(), tensor)).collect();
        let layout = safetensors::layout(&external);
        let file = File::create(&target).map_err(|e| io(&target, e))?;
        let mut file = BufWriter::new(file);
        let written = safetensors::write(&layout, &external, &mut file).and_then(|()| file.flush());
        written.map_err(|e| io(&target, e))?;
        let places = external.iter().zip(&layout.places);
        let places = places.map(|((name, _), &(offset, len))| (name.clone(), (file_name.clone(), offset, len)));
        writer.external = places.collect();
    }
    std::fs::write(path, writer.model()?).map_err(|e| io(path, e))
}

/// The model file's bytes, in which every constant that `place` gives a file name for is external data: all of that file.
pub fn encode_with(graph: &Graph, mut place: impl FnMut(&Constant) -> Option<String>) -> Result<Vec<u8>, ExportError> {
    let mut writer = Writer::new(graph)?;
    let constants = graph.values().filter_map(|(_, value)| match &value.source {
        Source::Constant(constant) if constant.tensor.dtype() != DType::String => Some((value, constant)),
        _ => None,
    });
    for (value, constant) in constants {
        if let Some(file) = place(constant) {
            writer.external.insert(value.name.clone(), (file, 0, constant.tensor.bytes().len()));
        }
    }
    writer.model()
}

/// The model file's bytes, weights inline.
pub fn encode(graph: &Graph) -> Result<Vec<u8>, ExportError> {
    Writer::new(graph)?.model()
}

struct Writer<'a> {
    graph: &'a Graph,
    /// Values that are not written under their own names: those of graphs inside nodes, where an outer name is in their way.
    renamed: HashMap<ValueId, String>,
    /// Names of the constants of this graph and those around it, by where their bytes lie: inner graphs use them as they are.
    shared: HashMap<(usize, usize), String>,
    nodes: Vec<NodeProto>,
    weights: Vec<(String, Tensor)>,
    /// Whether constants of zeros may be sparse.
    sparse: bool,
    /// File name, offset and length of a tensor that lies elsewhere, by its name.
    external: HashMap<String, (String, usize, usize)>,
    names: BTreeSet<String>,
    opset: i64,
    /// By domain: the last version that has all of its operators, where they were dropped.
    until: HashMap<&'static str, i64>,
}

impl<'a> Writer<'a> {
    fn new(graph: &'a Graph) -> Result<Writer<'a>, ExportError> {
        let names = graph.values().map(|(_, v)| v.name.clone()).collect();
        Writer::with(graph, HashMap::new(), HashMap::new(), names)
    }

    /// A writer that has written every node.
    fn with(
        graph: &'a Graph,
        renamed: HashMap<ValueId, String>,
        shared: HashMap<(usize, usize), String>,
        names: BTreeSet<String>,
    ) -> Result<Writer<'a>, ExportError> {
        let mut writer = Writer {
            graph,
            renamed,
            shared,
            nodes: Vec::new(),
            weights: Vec::new(),
            sparse: false,
            external: HashMap::new(),
            names,
            opset: EXPORT_OPSET,
            until: HashMap::new(),
        };
        for (id, value) in graph.values() {
            let Source::Constant(Constant { tensor, .. }) = &value.source else { continue };
            let place = (tensor.bytes().as_ptr() as usize, tensor.bytes().len());
            let known = writer.shared.get(&place).filter(|_| place.1 > 0 && !graph.outputs().contains(&id)).cloned();
            match known {
                Some(outer) if writer.renamed.contains_key(&id) => drop(writer.renamed.insert(id, outer)),
                _ => {
                    let name = writer.name(id);
                    writer.shared.insert(place, name.clone());
                    writer.weights.push((name, tensor.clone()));
                }
            }
        }
        for id in graph.topological_order()? {
            writer.node(id)?;
        }
        Ok(writer)
    }

    fn name(&self, id: ValueId) -> String {
        self.renamed.get(&id).unwrap_or(&self.graph.value(id).name).clone()
    }

    /// The graph in an attribute of `node`; its captured inputs are the outer values `captured`.
    fn inner(&mut self, subgraph: &Subgraph, captured: &[String]) -> Result<GraphProto, ExportError> {
        let graph = subgraph.graph();
        let mut renamed: HashMap<ValueId, String> = HashMap::new();
        for (&id, outer) in graph.inputs()[subgraph.formal()..].iter().zip(captured) {
            renamed.insert(id, outer.clone());
        }
        for (id, value) in graph.values().filter(|(_, v)| !matches!(v.source, Source::Removed)) {
            renamed.entry(id).or_insert_with(|| self.fresh(&value.name, 0));
        }
        let writer = Writer::with(graph, renamed, self.shared.clone(), std::mem::take(&mut self.names))?;
        self.names = writer.names.clone();
        self.opset = self.opset.max(writer.opset);
        for (domain, version) in &writer.until {
            let until = self.until.entry(domain).or_insert(*version);
            *until = *version.min(until);
        }
        Ok(writer.graph_proto(subgraph.formal()))
    }

    /// The graph as it was written, with its first `inputs` inputs.
    fn graph_proto(self, inputs: usize) -> GraphProto {
        let outputs: BTreeSet<ValueId> = self.graph.outputs().iter().copied().collect();
        let info = |id: &ValueId| {
            let value = self.graph.value(*id);
            ValueInfoProto { name: self.name(*id), r#type: Some(type_proto(&value.fact)) }
        };
        // A value between nodes is stated only where it has a static type: what is symbolic follows from the inputs.
        let inner = self.graph.values().filter(|(id, v)| {
            let is_static = v.fact.as_tensor().is_some_and(|t| t.constant_shape().is_some());
            matches!(v.source, Source::Node { .. }) && !outputs.contains(id) && is_static
        });
        let weights = self.weights.iter().map(|(name, tensor)| (self.sparse_tensor(name, tensor), name, tensor));
        let (mut sparse_initializer, mut initializer) = (Vec::new(), Vec::new());
        for (sparse, name, tensor) in weights {
            match sparse {
                Some(sparse) => sparse_initializer.push(sparse),
                None => initializer.push(self.tensor(name, tensor)),
            }
        }
        GraphProto {
            name: if self.graph.name.is_empty() { "graph".to_string() } else { self.graph.name.clone() },
            input: self.graph.inputs()[..inputs].iter().map(info).collect(),
            output: self.graph.outputs().iter().map(info).collect(),
            value_info: inner.map(|(id, _)| info(&id)).collect(),
            initializer,
            node: self.nodes,
            sparse_initializer,
        }
    }

    /// The constant as values and their places, where that is asked for and takes fewer bytes.
    fn sparse_tensor(&self, name: &str, tensor: &Tensor) -> Option<SparseTensorProto> {
        if !self.sparse || tensor.dtype() != DType::F32 || tensor.shape().is_empty() {
            return None;
        }
        let elements = tensor.to_vec::<f32>().ok()?;
        let (places, values): (Vec<i64>, Vec<f32>) =
            (0..).zip(&elements).filter(|(_, value)| value.to_bits() != 0).map(|(at, &value)| (at, value)).unzip();
        let count = values.len();
        if count == 0 || count * (size_of::<i64>() + size_of::<f32>()) + INLINE_BYTES > tensor.bytes().len() {
            return None;
        }
        Some(SparseTensorProto {
            values: Some(self.tensor(name, &Tensor::from_vec([count], values).ok()?)),
            indices: Some(self.tensor("", &Tensor::from_vec([count], places).ok()?)),
            dims: tensor.shape().dims().iter().map(|&d| d as i64).collect(),
        })
    }

    fn model(self) -> Result<Vec<u8>, ExportError> {
        let mut domains = BTreeSet::new();
        self.nodes.iter().for_each(|node| collect_domains(node, &mut domains));
        let newest = |domain: &str| if domain == "ai.onnx.ml" { 5 } else { 1 };
        let until = self.until.clone();
        let version = |domain: &str| until.get(domain).copied().unwrap_or(i64::MAX).min(newest(domain));
        let opsets = domains.iter().map(|d| OperatorSetIdProto { domain: d.clone(), version: version(d) });
        let default = OperatorSetIdProto { domain: String::new(), version: self.opset };
        let (opset, metadata) = (self.opset, &self.graph.metadata);
        let property =
            |(key, value): (&String, &String)| StringStringEntryProto { key: key.clone(), value: value.clone() };
        let metadata_props = metadata.iter().map(property).collect();
        let inputs = self.graph.inputs().len();
        let model = ModelProto {
            ir_version: if opset > EXPORT_OPSET { NEWER_IR_VERSION } else { IR_VERSION },
            producer_name: "cutover".to_string(),
            producer_version: env!("CARGO_PKG_VERSION").to_string(),
            graph: Some(self.graph_proto(inputs)),
            opset_import: [default].into_iter().chain(opsets).collect(),
            metadata_props,
            functions: Vec::new(),
        };
        let bytes = model.encoded_len();
        if bytes >= 2 << 30 {
            return Err(ExportError::TooLarge { bytes });
        }
        Ok(model.encode_to_vec())
    }

    fn node(&mut self, id: NodeId) -> Result<(), ExportError> {
        let node = self.graph.node(id);
        let Some(mut spelling) = node.op.spelling() else {
            let message = format!("{} is the user's own operator, and has no ONNX spelling", node.op.name());
            return Err(ExportError::Node { node: node.name.clone(), message });
        };
        if let Some(last) = spelling.until.filter(|_| spelling.domain.is_empty()) {
            let message =
                format!("this form of {} ended with opset {last}, and {EXPORT_OPSET} is written", node.op.name());
            return Err(ExportError::Node { node: node.name.clone(), message });
        }
        let name = |id: &Option<ValueId>| id.map_or(String::new(), |id| self.name(id));
        let mut inputs: Vec<String> = node.inputs.iter().map(name).collect();
        let mut outputs: Vec<String> = node.outputs.iter().map(|&o| self.name(o)).collect();
        let mut graphs = Vec::new();
        for (_, value) in spelling.attributes.iter().rev() {
            let Attribute::Graph(subgraph) = value else { continue };
            let captured = inputs.split_off(inputs.len().saturating_sub(subgraph.captured()));
            graphs.push(self.inner(subgraph, &captured)?);
        }
        let added = spelling.added_input.and_then(|at| {
            let present = at < inputs.len() && !inputs[at].is_empty();
            (at < inputs.len()).then(|| inputs.remove(at)).filter(|_| present)
        });
        while inputs.last().is_some_and(String::is_empty) {
            inputs.pop();
        }
        let then = std::mem::take(&mut spelling.then);
        let coerced = spelling.coerced_at.take().map(|axis| self.flatten(&node.name, axis, &mut inputs[0]));
        let steps = usize::from(added.is_some()) + usize::from(coerced.is_some()) + then.len();
        let result = outputs[0].clone();
        let mut left = steps;
        if steps > 0 {
            outputs[0] = self.fresh(&result, left);
        }
        let mut current = outputs[0].clone();
        self.push(&node.name, spelling, inputs, outputs);
        if let Some(written) = self.nodes.last_mut() {
            let places = written.attribute.iter_mut().filter(|a| a.r#type == attribute_type::GRAPH);
            places.zip(graphs.into_iter().rev()).for_each(|(place, graph)| place.g = Some(graph));
        }
        let mut next = |writer: &mut Self| {
            left -= 1;
            if left == 0 { result.clone() } else { writer.fresh(&result, left) }
        };
        if let Some(shape) = coerced {
            let output = next(self);
            self.push(
                &format!("{}.restore", node.name),
                Spelling::new("Reshape"),
                vec![current, shape],
                vec![output.clone()],
            );
            current = output;
        }
        if let Some(added) = added {
            let output = next(self);
            self.push(&format!("{}.add", node.name), Spelling::new("Add"), vec![current, added], vec![output.clone()]);
            current = output;
        }
        for activation in then {
            let output = next(self);
            self.activation(&node.name, activation, current, &output);
            current = output;
        }
        Ok(())
    }

    /// Puts a `Flatten` before `input`, and gives the name of its shape before that.
    fn flatten(&mut self, node: &str, axis: i64, input: &mut String) -> String {
        let shape = self.fresh(&format!("{input}.shape"), 0);
        let flat = self.fresh(&format!("{input}.flat"), 0);
        self.push(&format!("{node}.shape"), Spelling::new("Shape"), vec![input.clone()], vec![shape.clone()]);
        let spelling = Spelling::new("Flatten").with("axis", axis);
        self.push(&format!("{node}.flatten"), spelling, vec![std::mem::replace(input, flat.clone())], vec![flat]);
        shape
    }

    /// A one-input function, in nodes of the opset that is exported.
    fn activation(&mut self, node: &str, mut spelling: Spelling, input: String, output: &str) {
        let name = format!("{node}.{}", spelling.op_type.to_lowercase());
        match spelling.op_type {
            "Clip" => {
                let mut inputs = vec![input];
                for (bound, value) in std::mem::take(&mut spelling.attributes) {
                    let constant = self.fresh(&format!("{name}.{bound}"), 0);
                    if let Attribute::Float(value) = value {
                        self.weights.push((constant.clone(), Tensor::scalar(value)));
                    }
                    inputs.push(constant);
                }
                self.push(&name, spelling, inputs, vec![output.to_string()]);
            }
            "Swish" => {
                let gate = self.fresh(&format!("{output}.gate"), 0);
                self.push(&format!("{name}.gate"), Spelling::new("Sigmoid"), vec![input.clone()], vec![gate.clone()]);
                self.push(&name, Spelling::new("Mul"), vec![input, gate], vec![output.to_string()]);
            }
            _ => self.push(&name, spelling, vec![input], vec![output.to_string()]),
        }
    }

    fn push(&mut self, name: &str, spelling: Spelling, input: Vec<String>, output: Vec<String>) {
        self.opset = self.opset.max(spelling.since);
        if let Some(version) = spelling.until {
            let until = self.until.entry(spelling.domain).or_insert(version);
            *until = version.min(*until);
        }
        let attribute = spelling.attributes.into_iter().map(|(name, value)| attribute(name, value)).collect();
        let (op_type, domain) = (spelling.op_type.to_string(), spelling.domain.to_string());
        self.nodes.push(NodeProto {
            input,
            output,
            name: name.to_string(),
            op_type,
            attribute,
            domain,
            ..NodeProto::default()
        });
    }

    /// A value name that nothing has.
    fn fresh(&mut self, stem: &str, number: usize) -> String {
        let first = if number == 0 { stem.to_string() } else { format!("{stem}.before{number}") };
        let candidates = (1..).map(|i| format!("{stem}.{i}"));
        let name = [first].into_iter().chain(candidates).find(|n| !self.names.contains(n)).expect("a free number");
        self.names.insert(name.clone());
        name
    }

    fn tensor(&self, name: &str, tensor: &Tensor) -> TensorProto {
        if let Some((file, offset, length)) = self.external.get(name) {
            let entry = |key: &str, value: String| StringStringEntryProto { key: key.to_string(), value };
            let external_data = vec![
                entry("location", file.clone()),
                entry("offset", offset.to_string()),
                entry("length", length.to_string()),
            ];
            return TensorProto { external_data, data_location: 1, ..header(name, tensor) };
        }
        inline(name, tensor)
    }
}

/// The domains of `node` and of the graphs in it.
fn collect_domains(node: &NodeProto, into: &mut BTreeSet<String>) {
    if !node.domain.is_empty() {
        into.insert(node.domain.clone());
    }
    let graphs = node.attribute.iter().filter_map(|a| a.g.as_ref());
    graphs.flat_map(|graph| &graph.node).for_each(|inner| collect_domains(inner, into));
}

fn header(name: &str, tensor: &Tensor) -> TensorProto {
    TensorProto {
        name: name.to_string(),
        dims: tensor.shape().iter().map(|&d| d as i64).collect(),
        data_type: tensor.dtype().onnx_code(),
        ..TensorProto::default()
    }
}

fn inline(name: &str, tensor: &Tensor) -> TensorProto {
    match tensor.strings() {
        Ok(strings) => {
            let string_data = strings.iter().map(|s| Bytes::copy_from_slice(s.as_bytes())).collect();
            TensorProto { string_data, ..header(name, tensor) }
        }
        Err(_) => TensorProto { raw_data: Some(Bytes::copy_from_slice(tensor.bytes())), ..header(name, tensor) },
    }
}

fn attribute(name: &str, value: Attribute) -> AttributeProto {
    let mut proto = AttributeProto { name: name.to_string(), ..AttributeProto::default() };
    let bytes = |s: String| Bytes::from(s.into_bytes());
    proto.r#type = match value {
        Attribute::Int(v) => {
            proto.i = v;
            attribute_type::INT
        }
        Attribute::Float(v) => {
            proto.f = v;
            attribute_type::FLOAT
        }
        Attribute::String(v) => {
            proto.s = bytes(v);
            attribute_type::STRING
        }
        Attribute::Tensor(v) => {
            proto.t = Some(inline("", &v));
            attribute_type::TENSOR
        }
        Attribute::Ints(v) => {
            proto.ints = v;
            attribute_type::INTS
        }
        Attribute::Floats(v) => {
            proto.floats = v;
            attribute_type::FLOATS
        }
        // The writer of the node around it puts it there: it knows the outer names.
        Attribute::Graph(_) => attribute_type::GRAPH,
        Attribute::Strings(v) => {
            proto.strings = v.into_iter().map(bytes).collect();
            attribute_type::STRINGS
        }
        Attribute::Type(fact) => {
            proto.tp = Some(type_proto(&fact));
            attribute_type::TYPE_PROTO
        }
    };
    proto
}

fn type_proto(fact: &Fact) -> TypeProto {
    let element = |of: &Fact| Box::new(ElementTypeProto { elem_type: Some(Box::new(type_proto(of))) });
    let value = match fact {
        Fact::Tensor(tensor) => TypeValue::Tensor(tensor_type(tensor)),
        Fact::Sequence(of) => TypeValue::Sequence(element(of)),
        Fact::Optional(of) => TypeValue::Optional(element(of)),
        Fact::Map { key, value } => TypeValue::Map(Box::new(MapTypeProto {
            key_type: key.onnx_code(),
            value_type: Some(Box::new(type_proto(value))),
        })),
    };
    TypeProto { value: Some(value) }
}

/// Symbols are named dimensions; an expression of symbols has no ONNX spelling and stays open.
fn tensor_type(fact: &TensorFact) -> TensorTypeProto {
    let dim = |dim: &Dim| Dimension {
        value: match (dim.as_const(), dim.as_symbol()) {
            (Some(value), _) => Some(Extent::Value(value)),
            (None, Some(symbol)) => Some(Extent::Parameter(symbol.to_string())),
            (None, None) => None,
        },
    };
    let shape = fact.shape.as_ref().map(|dims| TensorShapeProto { dim: dims.iter().map(dim).collect() });
    TensorTypeProto { elem_type: fact.dtype.onnx_code(), shape }
}
