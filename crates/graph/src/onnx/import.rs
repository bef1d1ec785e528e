//! From the decoded messages to a graph.

use super::{
    mapping::FileBytes,
    proto::{self, AttributeProto, Extent, GraphProto, ModelProto, NodeProto, TypeProto, TypeValue, attribute_type},
    tensors::TensorReader,
};
use crate::{
    Constant, Dim, Fact, Graph, GraphError, ImportError, Op, TensorFact, ValueId,
    ops::{Attribute, CustomOp, NodeReader, OPERATOR_NAMES},
};
use cutover_tensor::{DType, Shape, Tensor};
use prost::{Message, bytes::Bytes};
use std::{
    collections::{BTreeMap, HashMap, HashSet},
    path::Path,
    sync::Arc,
};

/// Opsets of the default domain that are read.
pub const OLDEST_OPSET: i64 = 7;
pub const NEWEST_OPSET: i64 = 26;

/// How to import.
#[derive(Clone, Debug)]
pub struct ImportOptions {
    pub limits: Limits,
    /// Maps files, so that weights are not copied. Nobody may truncate or overwrite a file while a model made from it is in
    /// use (the process would be killed, or the weights torn); `false` reads files instead.
    pub map: bool,
    /// Operators of the user's own, found by their `domain.Name`.
    pub custom: Vec<Arc<dyn CustomOp>>,
}

impl Default for ImportOptions {
    fn default() -> Self {
        ImportOptions { limits: Limits::default(), map: true, custom: Vec::new() }
    }
}

/// What a file may ask for.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Of the model, and of every file of external data.
    pub file_bytes: u64,
    pub nodes: usize,
    pub values: usize,
    pub rank: usize,
    pub name_bytes: usize,
    /// Of all the model's sparse tensors together, once their zeros are written out.
    pub sparse_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            file_bytes: 64 << 30,
            nodes: 1 << 20,
            values: 1 << 22,
            rank: 64,
            name_bytes: 1 << 16,
            sparse_bytes: 1 << 30,
        }
    }
}

/// Reads the model at `path`, with external data from its folder only.
///
/// # Errors
/// Whatever is wrong with the file, and where.
pub fn import(path: &Path, options: &ImportOptions) -> Result<Graph, ImportError> {
    let file = FileBytes::open(path, options.map, options.limits.file_bytes)?;
    read(file, Some(path.parent().unwrap_or(Path::new(""))), options)
}

/// As [`import`], from memory. External data is read from `folder`, and refused where there is none.
pub fn import_bytes(bytes: Bytes, folder: Option<&Path>, options: &ImportOptions) -> Result<Graph, ImportError> {
    read(FileBytes::of(bytes), folder, options)
}

fn read(file: FileBytes, folder: Option<&Path>, options: &ImportOptions) -> Result<Graph, ImportError> {
    if file.0.is_empty() {
        return Err(ImportError::Decode("the file is empty".to_string()));
    }
    let model = ModelProto::decode(file.bytes()).map_err(|e| ImportError::Decode(e.to_string()))?;
    let reader = TensorReader::new(file, folder, options);
    let importer = Importer {
        graph: Graph::default(),
        values: HashMap::new(),
        value_names: Names::default(),
        node_names: Names::default(),
        opsets: opsets(&model)?,
        reader,
    };
    importer.model(model)
}

fn corrupt<T>(place: impl Into<String>, message: impl Into<String>) -> Result<T, ImportError> {
    Err(ImportError::Corrupt { place: place.into(), message: message.into() })
}

/// The version of every domain that the model imports.
fn opsets(model: &ModelProto) -> Result<HashMap<String, i64>, ImportError> {
    let mut opsets = HashMap::new();
    for import in &model.opset_import {
        let domain = if import.domain == "ai.onnx" { "" } else { import.domain.as_str() };
        if domain.is_empty() && !(OLDEST_OPSET..=NEWEST_OPSET).contains(&import.version) {
            let message = format!("opset {}, versions {OLDEST_OPSET} to {NEWEST_OPSET} are read", import.version);
            return Err(ImportError::Unsupported { place: "the model".to_string(), message });
        }
        // Some converters import the default domain under both its names.
        if let Some(other) = opsets.insert(domain.to_string(), import.version)
            && other != import.version
        {
            let message = format!("imports domain '{domain}' as of {other} and of {}", import.version);
            return corrupt("the model", message);
        }
    }
    if opsets.is_empty() {
        return corrupt("the model", "imports no operator set: not an ONNX model, or one of before ONNX 1.0");
    }
    Ok(opsets)
}

/// Names that are taken, and fresh ones in constant time: a file may give one name to every node it has.
#[derive(Default)]
struct Names {
    taken: HashSet<String>,
    /// The next number to try after a stem.
    next: HashMap<String, usize>,
}

impl Names {
    /// `stem`, or that with a number where it is taken.
    fn fresh(&mut self, stem: String) -> String {
        if self.taken.insert(stem.clone()) {
            return stem;
        }
        let next = self.next.entry(stem.clone()).or_insert(1);
        loop {
            let name = format!("{stem}.{next}");
            *next += 1;
            if self.taken.insert(name.clone()) {
                return name;
            }
        }
    }
}

struct Importer<'a> {
    graph: Graph,
    values: HashMap<String, ValueId>,
    value_names: Names,
    node_names: Names,
    opsets: HashMap<String, i64>,
    reader: TensorReader<'a>,
}

impl Importer<'_> {
    fn model(mut self, model: ModelProto) -> Result<Graph, ImportError> {
        let Some(graph) = model.graph else { return corrupt("the model", "has no graph") };
        self.graph.name = graph.name.clone();
        for property in model.metadata_props {
            self.graph.metadata.insert(property.key, property.value);
        }
        if !model.producer_name.is_empty() {
            let producer = format!("{} {}", model.producer_name, model.producer_version);
            self.graph.metadata.entry("producer".to_string()).or_insert(producer.trim().to_string());
        }
        self.check_limits(&graph)?;
        let made = graph.node.iter().flat_map(|n| &n.output).chain(graph.input.iter().map(|v| &v.name));
        let made = made.chain(graph.initializer.iter().map(|t| &t.name));
        let made = made.chain(graph.sparse_initializer.iter().filter_map(|t| Some(&t.values.as_ref()?.name)));
        self.value_names.taken = made.cloned().collect();
        self.initializers(&graph)?;
        self.inputs(&graph)?;
        let functions: HashSet<String> = model.functions.iter().map(|f| format!("{}.{}", f.domain, f.name)).collect();
        for index in order(&graph, |name| self.values.contains_key(name))? {
            self.node(&graph.node[index], index, &functions)?;
        }
        let mut outputs = Vec::with_capacity(graph.output.len());
        for output in &graph.output {
            match self.values.get(&output.name) {
                Some(&id) => outputs.push(id),
                None => return corrupt(format!("output '{}'", output.name), "nothing makes it"),
            }
        }
        if outputs.is_empty() {
            return corrupt(format!("graph '{}'", self.graph.name), "has no outputs");
        }
        self.graph.set_outputs(outputs);
        self.declared(&graph);
        self.graph.verify()?;
        Ok(self.graph)
    }

    fn check_limits(&self, graph: &GraphProto) -> Result<(), ImportError> {
        let limits = &self.reader.options.limits;
        let place = || format!("graph '{}'", graph.name);
        let check = |what, actual: usize, limit: usize| match actual > limit {
            true => Err(ImportError::Limit { place: place(), what, actual: actual as u64, limit: limit as u64 }),
            false => Ok(()),
        };
        check("the number of nodes", graph.node.len(), limits.nodes)?;
        let outputs: usize = graph.node.iter().map(|n| n.output.len() + n.input.len()).sum();
        let constants = graph.initializer.len() + graph.sparse_initializer.len();
        check("the number of values", outputs + graph.input.len() + constants, limits.values)?;
        let names = graph.node.iter().flat_map(|n| n.output.iter().chain(&n.input).chain([&n.name, &n.op_type]));
        let names = names.chain(graph.input.iter().map(|v| &v.name)).chain(graph.initializer.iter().map(|t| &t.name));
        check("the length of a name in bytes", names.map(String::len).max().unwrap_or(0), limits.name_bytes)?;
        Ok(())
    }

    fn initializers(&mut self, graph: &GraphProto) -> Result<(), ImportError> {
        for proto in &graph.initializer {
            let place = format!("initializer '{}'", proto.name);
            let tensor = self.reader.read(proto, &place)?;
            self.initializer(&proto.name, tensor, place)?;
        }
        for proto in &graph.sparse_initializer {
            let name = proto.values.as_ref().map_or("", |values| &values.name);
            let place = format!("sparse initializer '{name}'");
            let tensor = self.reader.read_sparse(proto, &place)?;
            self.initializer(name, tensor, place)?;
        }
        Ok(())
    }

    fn initializer(&mut self, name: &str, tensor: Tensor, place: String) -> Result<(), ImportError> {
        if name.is_empty() {
            return corrupt(place, "has no name");
        }
        let id = self.graph.add_constant(name, Constant::new(tensor));
        match self.values.insert(name.to_string(), id) {
            None => Ok(()),
            Some(_) => corrupt(place, "there is another value of this name"),
        }
    }

    /// Inputs that are initializers too are their defaults in IR versions below 4, and constants to everyone since.
    fn inputs(&mut self, graph: &GraphProto) -> Result<(), ImportError> {
        let mut seen = HashSet::new();
        for input in &graph.input {
            let place = format!("input '{}'", input.name);
            if input.name.is_empty() || !seen.insert(&input.name) {
                return corrupt(place, "must have a name of its own");
            }
            if self.values.contains_key(&input.name) {
                continue;
            }
            let Some(declared) = &input.r#type else { return corrupt(place, "has no type") };
            let fact = fact(declared, &input.name, &place, self.reader.options.limits.rank)?;
            let id = self.graph.add_input(&input.name, fact);
            self.values.insert(input.name.clone(), id);
        }
        Ok(())
    }

    fn node(&mut self, node: &NodeProto, index: usize, functions: &HashSet<String>) -> Result<(), ImportError> {
        let name = if node.name.is_empty() { format!("{}_{index}", node.op_type) } else { node.name.clone() };
        let domain = if node.domain == "ai.onnx" { "" } else { node.domain.as_str() };
        let place = format!("node '{name}' ({})", node.op_type);
        let Some(&opset) = self.opsets.get(domain) else {
            return corrupt(place, format!("is of domain '{domain}', which the model does not import"));
        };
        let mut attributes = BTreeMap::new();
        for attribute in &node.attribute {
            let value = self.attribute(attribute, &place)?;
            if attributes.insert(attribute.name.clone(), value).is_some() {
                return corrupt(place, format!("has attribute '{}' twice", attribute.name));
            }
        }
        let mut inputs = Vec::with_capacity(node.input.len());
        for (at, input) in node.input.iter().enumerate() {
            match self.values.get(input) {
                _ if input.is_empty() => inputs.push(None),
                Some(&id) => inputs.push(Some(id)),
                None => return corrupt(place, format!("input {at} is '{input}', which nothing makes")),
            }
        }
        let named = node.output.iter().rposition(|o| !o.is_empty()).map_or(0, |last| last + 1);
        if named == 0 {
            return corrupt(place, "names no output");
        }
        if domain.is_empty() && node.op_type == "Constant" {
            let tensor = constant(&mut attributes, &place)?;
            let id = self.graph.add_constant(&node.output[0], Constant::new(tensor));
            return self.name_value(&node.output[0], id, &place);
        }
        let present = inputs.iter().map(Option::is_some).collect();
        let mut reader = NodeReader::new(&name, domain, &node.op_type, opset, present, named, attributes);
        let qualified = if domain.is_empty() { node.op_type.clone() } else { format!("{domain}.{}", node.op_type) };
        let custom = self.reader.options.custom.iter().find(|op| op.name() == qualified);
        let op = match (custom, Op::import(&qualified, &mut reader)) {
            (Some(op), _) => Op::Custom(op.clone()),
            (None, Some(op)) => {
                let op = op?;
                for &at in reader.inserted_inputs() {
                    inputs.insert(at.min(inputs.len()), None);
                }
                for (at, tensor) in reader.finish()? {
                    let value = self.value_names.fresh(format!("{name}.input{at}"));
                    inputs.resize(inputs.len().max(at + 1), None);
                    inputs[at] = Some(self.graph.add_constant(value, Constant::new(tensor)));
                }
                op
            }
            (None, None) => {
                let hint = hint(&qualified, &node.op_type, functions);
                return Err(ImportError::UnknownOp { node: name, op: qualified, opset, hint });
            }
        };
        let output_names = (0..named)
            .map(|at| match node.output[at].as_str() {
                "" => self.value_names.fresh(format!("{name}.output{at}")),
                given => given.to_string(),
            })
            .collect();
        let name = self.node_names.fresh(name);
        let id = self.graph.add_node(name, op, inputs, output_names)?;
        let outputs = self.graph.node(id).outputs.clone();
        for (given, id) in node.output.iter().zip(outputs).filter(|(given, _)| !given.is_empty()) {
            self.name_value(given, id, &place)?;
        }
        Ok(())
    }

    fn name_value(&mut self, name: &str, id: ValueId, place: &str) -> Result<(), ImportError> {
        match self.values.insert(name.to_string(), id) {
            None => Ok(()),
            Some(_) => corrupt(place, format!("makes '{name}', which is there already: every value is made once")),
        }
    }

    fn attribute(&mut self, attribute: &AttributeProto, place: &str) -> Result<Attribute, ImportError> {
        let place = format!("{place}, attribute '{}'", attribute.name);
        let text = |bytes: &Bytes| match std::str::from_utf8(bytes) {
            Ok(text) => Ok(text.to_string()),
            Err(_) => corrupt(place.as_str(), "is not UTF-8"),
        };
        if !attribute.ref_attr_name.is_empty() {
            return corrupt(place, "refers to an attribute of a function, outside of one");
        }
        Ok(match attribute.r#type {
            attribute_type::FLOAT => Attribute::Float(attribute.f),
            attribute_type::INT => Attribute::Int(attribute.i),
            attribute_type::STRING => Attribute::String(text(&attribute.s)?),
            attribute_type::FLOATS => Attribute::Floats(attribute.floats.clone()),
            attribute_type::INTS => Attribute::Ints(attribute.ints.clone()),
            attribute_type::STRINGS => {
                Attribute::Strings(attribute.strings.iter().map(text).collect::<Result<_, _>>()?)
            }
            attribute_type::TENSOR => match &attribute.t {
                Some(tensor) => Attribute::Tensor(self.reader.read(tensor, &place)?),
                None => return corrupt(place, "is said to be a tensor, and there is none"),
            },
            // Only constants have such an attribute, and to them it is a tensor like any other.
            attribute_type::SPARSE_TENSOR => match &attribute.sparse_tensor {
                Some(tensor) => Attribute::Tensor(self.reader.read_sparse(tensor, &place)?),
                None => return corrupt(place, "is said to be a sparse tensor, and there is none"),
            },
            attribute_type::TYPE_PROTO => match &attribute.tp {
                Some(declared) => Attribute::Type(fact(declared, &place, &place, self.reader.options.limits.rank)?),
                None => return corrupt(place, "is said to be a type, and there is none"),
            },
            attribute_type::GRAPH => {
                let message = "subgraphs (If, Loop, Scan) can't be loaded yet".to_string();
                return Err(ImportError::Unsupported { place, message });
            }
            other => {
                let message = format!("attributes of type {other}");
                return Err(ImportError::Unsupported { place, message });
            }
        })
    }

    /// Where inference knows less than the file declares of a value, the declaration is taken.
    fn declared(&mut self, graph: &GraphProto) {
        for info in graph.value_info.iter().chain(&graph.output) {
            let (Some(&id), Some(declared)) = (self.values.get(&info.name), &info.r#type) else { continue };
            let Ok(declared) = fact(declared, &info.name, "", self.reader.options.limits.rank) else { continue };
            if let (Fact::Tensor(known), Fact::Tensor(declared)) = (&mut self.graph.value_mut(id).fact, declared)
                && known.shape.is_none()
                && known.dtype == declared.dtype
            {
                known.shape = declared.shape;
            }
        }
    }
}

/// The value of a `Constant` node.
fn constant(attributes: &mut BTreeMap<String, Attribute>, place: &str) -> Result<Tensor, ImportError> {
    let tensor = match attributes.pop_first() {
        Some((name, value)) if attributes.is_empty() => match (name.as_str(), value) {
            ("value" | "sparse_value", Attribute::Tensor(tensor)) => Ok(tensor),
            ("value_float", Attribute::Float(v)) => Ok(Tensor::scalar(v)),
            ("value_int", Attribute::Int(v)) => Ok(Tensor::scalar(v)),
            ("value_floats", Attribute::Floats(v)) => Tensor::from_vec([v.len()], v),
            ("value_ints", Attribute::Ints(v)) => Tensor::from_vec([v.len()], v),
            ("value_string", Attribute::String(v)) => Tensor::from_strings(Shape::scalar(), vec![v]),
            ("value_strings", Attribute::Strings(v)) => Tensor::from_strings([v.len()], v),
            (name, _) => return corrupt(place, format!("attribute '{name}' is no value of a constant")),
        },
        _ => return corrupt(place, "must have one attribute, its value"),
    };
    tensor.or_else(|e| corrupt(place, e.to_string()))
}

/// What may help whoever met an unknown operator.
fn hint(qualified: &str, op_type: &str, functions: &HashSet<String>) -> String {
    if functions.contains(qualified) {
        return "; it is a function of the model itself, and those can't be loaded yet".to_string();
    }
    let similar = OPERATOR_NAMES.iter().find(|n| n.rsplit('.').next().is_some_and(|n| n.eq_ignore_ascii_case(op_type)));
    similar.map(|n| format!("; there is {n}")).unwrap_or_default()
}

/// The nodes in an order in which every value is made before it is used, whatever their order in the file.
fn order(graph: &GraphProto, known: impl Fn(&str) -> bool) -> Result<Vec<usize>, ImportError> {
    let mut maker: HashMap<&str, usize> = HashMap::new();
    for (index, node) in graph.node.iter().enumerate() {
        for output in node.output.iter().filter(|o| !o.is_empty()) {
            maker.insert(output, index);
        }
    }
    let needs = |index: usize| {
        let inputs = graph.node[index].input.iter().filter(|i| !i.is_empty() && !known(i));
        inputs.filter_map(|i| maker.get(i.as_str()).copied()).collect::<HashSet<usize>>()
    };
    let mut waiting: Vec<usize> = Vec::with_capacity(graph.node.len());
    let mut users: Vec<Vec<usize>> = vec![Vec::new(); graph.node.len()];
    for index in 0..graph.node.len() {
        let needed = needs(index);
        waiting.push(needed.len());
        needed.into_iter().for_each(|n| users[n].push(index));
    }
    let mut ready: std::collections::BinaryHeap<_> =
        (0..waiting.len()).filter(|&i| waiting[i] == 0).map(std::cmp::Reverse).collect();
    let mut order = Vec::with_capacity(waiting.len());
    while let Some(std::cmp::Reverse(index)) = ready.pop() {
        order.push(index);
        for &user in &users[index] {
            waiting[user] -= 1;
            if waiting[user] == 0 {
                ready.push(std::cmp::Reverse(user));
            }
        }
    }
    if order.len() == graph.node.len() {
        return Ok(order);
    }
    // Every node left waits for one that is left: following them leads into a cycle.
    let done: HashSet<usize> = order.into_iter().collect();
    let mut node = (0..graph.node.len()).find(|i| !done.contains(i)).expect("one is left");
    let mut seen = HashSet::new();
    while seen.insert(node) {
        node = needs(node).into_iter().filter(|n| !done.contains(n)).min().expect("it waits for one that is left");
    }
    let node = &graph.node[node];
    let name = if node.name.is_empty() { node.output.first().cloned().unwrap_or_default() } else { node.name.clone() };
    Err(GraphError::Cycle { node: format!("{name}' ('{}", node.op_type) }.into())
}

/// The fact that a declared type is; unnamed dimensions get symbols called after `name`.
fn fact(declared: &TypeProto, name: &str, place: &str, rank_limit: usize) -> Result<Fact, ImportError> {
    let dtype = |code: i32| match DType::from_onnx_code(code) {
        Some(dtype) => Ok(dtype),
        None => corrupt(place, format!("element type {code} is not one of ONNX's")),
    };
    match &declared.value {
        Some(TypeValue::Tensor(tensor)) => {
            let dtype = dtype(tensor.elem_type)?;
            let Some(shape) = &tensor.shape else { return Ok(TensorFact::unknown_rank(dtype).into()) };
            if shape.dim.len() > rank_limit {
                let (actual, limit) = (shape.dim.len() as u64, rank_limit as u64);
                return Err(ImportError::Limit { place: place.to_string(), what: "the rank", actual, limit });
            }
            let dims = shape.dim.iter().enumerate().map(|(axis, dim)| match &dim.value {
                Some(Extent::Value(value)) if *value >= 0 => Dim::Const(*value),
                Some(Extent::Parameter(symbol)) if !symbol.is_empty() => Dim::symbol(symbol.as_str()),
                // Some exporters write -1 for what varies.
                _ => Dim::symbol(format!("{name}.{axis}")),
            });
            Ok(TensorFact::new(dtype, dims.collect::<Vec<_>>()).into())
        }
        Some(TypeValue::Sequence(of)) => Ok(Fact::Sequence(Box::new(element(of, name, place, rank_limit)?))),
        Some(TypeValue::Optional(of)) => Ok(Fact::Optional(Box::new(element(of, name, place, rank_limit)?))),
        Some(TypeValue::Map(map)) => {
            let Some(value) = &map.value_type else { return corrupt(place, "a map without a type of its values") };
            Ok(Fact::Map { key: dtype(map.key_type)?, value: Box::new(fact(value, name, place, rank_limit)?) })
        }
        Some(TypeValue::SparseTensor(_)) => {
            Err(ImportError::Unsupported { place: place.to_string(), message: "sparse tensors".to_string() })
        }
        None => corrupt(place, "has no type"),
    }
}

fn element(of: &proto::ElementTypeProto, name: &str, place: &str, rank_limit: usize) -> Result<Fact, ImportError> {
    match &of.elem_type {
        Some(of) => fact(of, name, place, rank_limit),
        None => corrupt(place, "a sequence or optional of no type"),
    }
}
