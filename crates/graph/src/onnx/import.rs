//! From the decoded messages to a graph.

use super::{
    gradient::Tape,
    mapping::FileBytes,
    order::order,
    proto::{self, AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, attribute_type},
    tensors::{External, TensorReader},
    types::{fact, of_any_shape, traced},
};
use crate::{
    Constant, Dim, Fact, Graph, ImportError, Op, Source, TensorFact, ValueId,
    ops::{Attribute, CustomOp, Identity, NodeReader, OPERATOR_NAMES, Subgraph, Unsqueeze, trailing_axes},
};
use cutover_tensor::{Buffer, DType, Shape, Tensor};
use prost::{Message, bytes::Bytes};
use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    path::{Path, PathBuf},
    rc::Rc,
    sync::Arc,
};

/// Opsets of the default domain that are read.
pub const OLDEST_OPSET: i64 = 1;
pub const NEWEST_OPSET: i64 = 28;

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
    /// How deep graphs may lie in nodes, and functions call one another.
    pub depth: usize,
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
            depth: 64,
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
    read(file, External::Folder(path.parent().unwrap_or(Path::new(""))), options)
}

/// As [`import`], from memory. External data is read from `folder`, and refused where there is none.
pub fn import_bytes(bytes: Bytes, folder: Option<&Path>, options: &ImportOptions) -> Result<Graph, ImportError> {
    read(FileBytes::of(bytes), folder.map_or(External::None, External::Folder), options)
}

/// As [`import`], of files that `open` gives by their names: no path is looked at.
pub fn import_files(
    model: Arc<Buffer>,
    open: &dyn Fn(&str) -> std::io::Result<Arc<Buffer>>,
    options: &ImportOptions,
) -> Result<Graph, ImportError> {
    read(FileBytes(model), External::Files(open), options)
}

/// The version of every domain that the model in `bytes` imports; the default domain's name is empty.
///
/// # Errors
/// Bytes that are no ONNX model.
pub fn imported_opsets(bytes: Bytes) -> Result<BTreeMap<String, i64>, ImportError> {
    Ok(opsets(&decode(bytes)?.opset_import, "the model")?.into_iter().collect())
}

/// The files that the model at `path` is made of: itself, and those of external data that it names. Whether these are there, and inside the model's
/// folder, an import tells.
///
/// # Errors
/// A file that cannot be read, or is no ONNX model.
pub fn files(path: &Path, options: &ImportOptions) -> Result<Vec<PathBuf>, ImportError> {
    fn of_tensor(tensor: &proto::TensorProto, found: &mut BTreeSet<String>) {
        found.extend(tensor.external_data.iter().filter(|e| e.key == "location").map(|e| e.value.clone()));
    }
    fn of_nodes(nodes: &[NodeProto], found: &mut BTreeSet<String>) {
        for attribute in nodes.iter().flat_map(|node| &node.attribute) {
            attribute.t.iter().for_each(|tensor| of_tensor(tensor, found));
            attribute.g.iter().for_each(|graph| of_graph(graph, found));
        }
    }
    fn of_graph(graph: &GraphProto, found: &mut BTreeSet<String>) {
        graph.initializer.iter().for_each(|tensor| of_tensor(tensor, found));
        for sparse in &graph.sparse_initializer {
            sparse.values.iter().chain(&sparse.indices).for_each(|tensor| of_tensor(tensor, found));
        }
        of_nodes(&graph.node, found);
    }
    let file = FileBytes::open(path, options.map, options.limits.file_bytes)?;
    let (model, mut found) = (decode(file.bytes())?, BTreeSet::new());
    model.graph.iter().for_each(|graph| of_graph(graph, &mut found));
    model.functions.iter().for_each(|function| of_nodes(&function.node, &mut found));
    let folder = path.parent().unwrap_or(Path::new(""));
    Ok(std::iter::once(path.to_path_buf()).chain(found.into_iter().map(|name| folder.join(name))).collect())
}

fn decode(bytes: Bytes) -> Result<ModelProto, ImportError> {
    if bytes.is_empty() {
        return Err(ImportError::Decode("the file is empty".to_string()));
    }
    ModelProto::decode(bytes).map_err(|e| ImportError::Decode(e.to_string()))
}

fn read(file: FileBytes, external: External<'_>, options: &ImportOptions) -> Result<Graph, ImportError> {
    let model = decode(file.bytes())?;
    let importer = Importer {
        graphs: Vec::new(),
        scopes: Vec::new(),
        functions: functions(&model)?,
        reader: TensorReader::new(file, external, options),
        nodes: 0,
    };
    importer.model(&model)
}

pub(super) fn corrupt<T>(place: impl Into<String>, message: impl Into<String>) -> Result<T, ImportError> {
    Err(ImportError::Corrupt { place: place.into(), message: message.into() })
}

/// The version of every domain that a model or a function imports.
fn opsets(imports: &[proto::OperatorSetIdProto], place: &str) -> Result<HashMap<String, i64>, ImportError> {
    let mut opsets = HashMap::new();
    for import in imports {
        let domain = if import.domain == "ai.onnx" { "" } else { import.domain.as_str() };
        if domain.is_empty() && !(OLDEST_OPSET..=NEWEST_OPSET).contains(&import.version) {
            let message = format!("opset {}, versions {OLDEST_OPSET} to {NEWEST_OPSET} are read", import.version);
            return Err(ImportError::Unsupported { place: place.to_string(), message });
        }
        // Some converters import the default domain under both its names.
        if let Some(other) = opsets.insert(domain.to_string(), import.version)
            && other != import.version
        {
            let message = format!("imports domain '{domain}' as of {other} and of {}", import.version);
            return corrupt(place, message);
        }
    }
    if opsets.is_empty() {
        return corrupt(place, "imports no operator set: not an ONNX model, or one of before ONNX 1.0");
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

/// The domain and name of the operator that is replaced by the gradient of the graph it is in.
pub(super) const GRADIENT: (&str, &str) = ("ai.onnx.preview.training", "Gradient");

type Functions<'a> = HashMap<(&'a str, &'a str, &'a str), &'a FunctionProto>;

/// The model's own functions by domain, name and overload.
fn functions(model: &ModelProto) -> Result<Functions<'_>, ImportError> {
    let mut functions = HashMap::new();
    for function in &model.functions {
        let key = (default_domain(&function.domain), function.name.as_str(), function.overload.as_str());
        if functions.insert(key, function).is_some() {
            return corrupt(format!("function '{}.{}'", function.domain, function.name), "is there twice");
        }
    }
    Ok(functions)
}

fn default_domain(domain: &str) -> &str {
    if domain == "ai.onnx" { "" } else { domain }
}

struct Importer<'a> {
    /// The graphs that are being read, each inside a node of the one before.
    graphs: Vec<Building>,
    /// The names that are visible: of each graph, and of the functions that are being called in it.
    scopes: Vec<Scope<'a>>,
    functions: Functions<'a>,
    reader: TensorReader<'a>,
    /// Read up to now, those of functions at every call.
    nodes: usize,
}

#[derive(Default)]
struct Building {
    graph: Graph,
    value_names: Names,
    node_names: Names,
    /// Values of the graph before that this one uses: its last inputs.
    captures: Vec<ValueId>,
}

struct Scope<'a> {
    /// `None` is an input that the caller of a function left out.
    values: HashMap<String, Option<ValueId>>,
    opsets: Rc<HashMap<String, i64>>,
    /// What a function was called with, resolved.
    attributes: Rc<HashMap<&'a str, AttributeProto>>,
    kind: ScopeKind,
}

enum ScopeKind {
    /// Sees what the scope before it sees.
    Graph,
    /// Sees its arguments only; the names it makes begin with the call's.
    Function { call: String },
}

impl<'a> Importer<'a> {
    fn model(mut self, model: &'a ModelProto) -> Result<Graph, ImportError> {
        let Some(graph) = &model.graph else { return corrupt("the model", "has no graph") };
        let opsets = Rc::new(opsets(&model.opset_import, "the model")?);
        let scope = Scope { values: HashMap::new(), opsets, attributes: Rc::default(), kind: ScopeKind::Graph };
        let mut result = self.graph(graph, scope, &[])?.graph;
        if result.outputs().is_empty() {
            return corrupt(format!("graph '{}'", result.name), "has no outputs");
        }
        for property in &model.metadata_props {
            result.metadata.insert(property.key.clone(), property.value.clone());
        }
        if !model.producer_name.is_empty() {
            let producer = format!("{} {}", model.producer_name, model.producer_version);
            result.metadata.entry("producer".to_string()).or_insert(producer.trim().to_string());
        }
        Ok(result)
    }

    /// Reads a graph in a scope of its own. `given` are the facts of its inputs where they say no type.
    fn graph(
        &mut self,
        graph: &'a GraphProto,
        scope: Scope<'a>,
        given: &[Option<Fact>],
    ) -> Result<Building, ImportError> {
        self.check_limits(graph)?;
        let made = graph.node.iter().flat_map(|n| &n.output).chain(graph.input.iter().map(|v| &v.name));
        let made = made.chain(graph.initializer.iter().map(|t| &t.name));
        let made = made.chain(graph.sparse_initializer.iter().filter_map(|t| Some(&t.values.as_ref()?.name)));
        let value_names = Names { taken: made.cloned().collect(), next: HashMap::new() };
        let inner = Graph::new(graph.name.clone());
        self.graphs.push(Building { graph: inner, value_names, ..Building::default() });
        self.scopes.push(scope);
        self.initializers(graph)?;
        self.inputs(graph, given)?;
        let known = |name: &str| self.scopes.last().is_some_and(|scope| scope.values.contains_key(name));
        for index in order(&graph.node, known)? {
            self.node(&graph.node[index], index)?;
        }
        let mut outputs = Vec::with_capacity(graph.output.len());
        for output in &graph.output {
            match self.find(self.scopes.len() - 1, &output.name) {
                Some(Some(id)) => outputs.push(self.output(&output.name, id)?),
                _ => return corrupt(format!("output '{}'", output.name), "nothing makes it"),
            }
        }
        self.declared(graph);
        let (Some(mut building), Some(_)) = (self.graphs.pop(), self.scopes.pop()) else {
            unreachable!("pushed above")
        };
        building.graph.set_outputs(outputs);
        building.graph.verify()?;
        Ok(building)
    }

    /// The value for a graph's output `name`: `id`, under that name. Functions and outer graphs may know it under another.
    fn output(&mut self, name: &str, id: ValueId) -> Result<ValueId, ImportError> {
        let graph = &mut self.building().graph;
        if graph.value(id).name == name {
            return Ok(id);
        }
        let node = self.building().node_names.fresh(format!("{name}.identity"));
        let node = self.building().graph.add_node(node, Identity.into(), vec![Some(id)], vec![name.to_string()])?;
        Ok(self.building().graph.node(node).outputs[0])
    }

    fn building(&mut self) -> &mut Building {
        self.graphs.last_mut().expect("a graph is being read")
    }

    fn scope(&mut self) -> &mut Scope<'a> {
        self.scopes.last_mut().expect("a graph is being read")
    }

    /// The value that `name` is in scope number `at`: one of an outer graph becomes an input of the inner one, or a constant of its own.
    fn find(&mut self, at: usize, name: &str) -> Option<Option<ValueId>> {
        let scope = &self.scopes[at];
        if let Some(&found) = scope.values.get(name) {
            return Some(found);
        }
        if at == 0 || !matches!(scope.kind, ScopeKind::Graph) {
            return None;
        }
        let found = self.find(at - 1, name)?.map(|outer| {
            let of_graph = self.scopes[..=at].iter().filter(|s| matches!(s.kind, ScopeKind::Graph)).count() - 1;
            let (before, rest) = self.graphs.split_at_mut(of_graph);
            let (outer_graph, inner) = (&before[of_graph - 1].graph, &mut rest[0]);
            let value = outer_graph.value(outer);
            let name = inner.value_names.fresh(value.name.clone());
            if let Source::Constant(constant) = &value.source {
                return inner.graph.add_constant(name, constant.clone());
            }
            inner.captures.push(outer);
            inner.graph.add_input(name, value.fact.clone())
        });
        self.scopes[at].values.insert(name.to_string(), found);
        Some(found)
    }

    fn check_limits(&self, graph: &GraphProto) -> Result<(), ImportError> {
        let limits = &self.reader.options.limits;
        let place = || format!("graph '{}'", graph.name);
        let check = |what, actual: usize, limit: usize| match actual > limit {
            true => Err(ImportError::Limit { place: place(), what, actual: actual as u64, limit: limit as u64 }),
            false => Ok(()),
        };
        check("the number of nodes", self.nodes.saturating_add(graph.node.len()), limits.nodes)?;
        check("the depth of graphs in nodes", self.scopes.len(), limits.depth)?;
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
        let id = self.building().graph.add_constant(name, Constant::new(tensor));
        match self.scope().values.insert(name.to_string(), Some(id)) {
            None => Ok(()),
            Some(_) => corrupt(place, "there is another value of this name"),
        }
    }

    /// Inputs that are initializers too are their defaults in IR versions below 4, and constants to everyone since.
    fn inputs(&mut self, graph: &GraphProto, given: &[Option<Fact>]) -> Result<(), ImportError> {
        let mut seen = HashSet::new();
        for (at, input) in graph.input.iter().enumerate() {
            let place = format!("input '{}'", input.name);
            if input.name.is_empty() || !seen.insert(&input.name) {
                return corrupt(place, "must have a name of its own");
            }
            if self.scope().values.contains_key(&input.name) {
                continue;
            }
            let declared = input.r#type.as_ref().filter(|declared| declared.value.is_some());
            let fact = match (declared, given.get(at)) {
                (Some(declared), given) => {
                    let declared = fact(declared, &input.name, &place, self.reader.options.limits.rank)?;
                    given
                        .and_then(Option::as_ref)
                        .map_or(declared.clone(), |given| traced(declared, given, &input.name))
                }
                (None, Some(Some(given))) => of_any_shape(given),
                (None, _) => return corrupt(place, "has no type"),
            };
            let id = self.building().graph.add_input(&input.name, fact);
            self.scope().values.insert(input.name.clone(), Some(id));
        }
        Ok(())
    }

    fn node(&mut self, node: &'a NodeProto, index: usize) -> Result<(), ImportError> {
        let name = if node.name.is_empty() { format!("{}_{index}", node.op_type) } else { node.name.clone() };
        let domain = default_domain(&node.domain);
        let place = format!("node '{name}' ({})", node.op_type);
        self.nodes += 1;
        let (actual, limit) = (self.nodes as u64, self.reader.options.limits.nodes as u64);
        if actual > limit {
            return Err(ImportError::Limit { place, what: "the number of nodes, functions inlined", actual, limit });
        }
        let mut inputs = Vec::with_capacity(node.input.len());
        for (at, input) in node.input.iter().enumerate() {
            match self.find(self.scopes.len() - 1, input) {
                _ if input.is_empty() => inputs.push(None),
                Some(found) => inputs.push(found),
                None => return corrupt(place, format!("input {at} is '{input}', which nothing makes")),
            }
        }
        let named = node.output.iter().rposition(|o| !o.is_empty()).map_or(0, |last| last + 1);
        if named == 0 {
            return corrupt(place, "names no output");
        }
        let function = self.functions.get(&(domain, node.op_type.as_str(), node.overload.as_str()));
        if let Some(&function) = function {
            return self.call(function, node, &name, inputs, &place);
        }
        self.operator(node, name, named, inputs, place)
    }

    /// A node that calls no function, with its inputs; its first `named` outputs have names.
    fn operator(
        &mut self,
        node: &'a NodeProto,
        name: String,
        named: usize,
        mut inputs: Vec<Option<ValueId>>,
        place: String,
    ) -> Result<(), ImportError> {
        let domain = default_domain(&node.domain);
        let Some(&opset) = self.scope().opsets.get(domain) else {
            return corrupt(place, format!("is of domain '{domain}', which the model does not import"));
        };
        let mut attributes = BTreeMap::new();
        let mut captures = BTreeMap::new();
        let formal = if node.attribute.iter().any(|a| a.g.is_some()) { self.formal(node, &inputs) } else { Vec::new() };
        for given in &node.attribute {
            let Some(attribute) = self.resolve(given, &place)? else { continue };
            let value = match (&attribute, &given.g) {
                (Cow::Borrowed(AttributeProto { r#type: attribute_type::GRAPH, .. }), Some(graph)) => {
                    let (opsets, attributes) = (self.scope().opsets.clone(), self.scope().attributes.clone());
                    let scope = Scope { values: HashMap::new(), opsets, attributes, kind: ScopeKind::Graph };
                    let building = self.graph(graph, scope, &formal)?;
                    let subgraph = Subgraph::new(building.graph, building.captures.len())?;
                    captures.insert(given.name.clone(), building.captures);
                    Attribute::Graph(subgraph)
                }
                _ => self.attribute(&attribute, &place)?,
            };
            if attributes.insert(attribute.name.clone(), value).is_some() {
                return corrupt(place, format!("has attribute '{}' twice", attribute.name));
            }
        }
        if domain.is_empty() && node.op_type == "Constant" {
            let tensor = constant(&mut attributes, &place)?;
            let name = self.value_name(&node.output[0]);
            let id = self.building().graph.add_constant(name, Constant::new(tensor));
            return self.name_value(&node.output[0], id, &place);
        }
        if (domain, node.op_type.as_str()) == GRADIENT {
            return self.gradient(node, &name, &inputs, attributes, &place);
        }
        let present = inputs.iter().map(Option::is_some).collect();
        let name = match &self.scope().kind {
            ScopeKind::Function { call } => format!("{call}/{name}"),
            ScopeKind::Graph => name,
        };
        let mut reader = NodeReader::new(&name, domain, &node.op_type, opset, present, named, attributes);
        let qualified = if domain.is_empty() { node.op_type.clone() } else { format!("{domain}.{}", node.op_type) };
        let custom = self.reader.options.custom.iter().find(|op| op.name() == qualified);
        let op = match (custom, Op::import(&qualified, &mut reader)) {
            (Some(op), _) => Op::Custom(op.clone()),
            (None, Some(op)) => {
                let op = op?;
                inputs.drain(..reader.removed_inputs());
                for &at in reader.inserted_inputs() {
                    inputs.insert(at.min(inputs.len()), None);
                }
                for &(at, axis) in reader.aligned_inputs() {
                    self.align(&mut inputs, at, axis, &name, &place)?;
                }
                let captured = std::mem::take(&mut reader.subgraphs);
                let first =
                    inputs.first().copied().flatten().and_then(|id| self.building().graph.value(id).fact.as_tensor());
                let first = first.map(|fact| fact.dtype);
                for (at, tensor) in reader.finish(first)? {
                    let building = self.building();
                    let value = building.value_names.fresh(format!("{name}.input{at}"));
                    inputs.resize(inputs.len().max(at + 1), None);
                    inputs[at] = Some(building.graph.add_constant(value, Constant::new(tensor)));
                }
                inputs.extend(captured.iter().flat_map(|name| &captures[name]).map(|&id| Some(id)));
                op
            }
            (None, None) => {
                return Err(ImportError::UnknownOp {
                    node: name,
                    op: qualified,
                    opset,
                    hint: hint(domain, &node.op_type),
                });
            }
        };
        let output_names = (0..named)
            .map(|at| match node.output[at].as_str() {
                "" => self.building().value_names.fresh(format!("{name}.output{at}")),
                given => self.value_name(given),
            })
            .collect();
        let building = self.building();
        let name = building.node_names.fresh(name);
        let id = building.graph.add_node(name, op, inputs, output_names)?;
        let outputs = building.graph.node(id).outputs.clone();
        for (given, id) in node.output.iter().zip(outputs).filter(|(given, _)| !given.is_empty()) {
            self.name_value(given, id, &place)?;
        }
        Ok(())
    }

    /// What its node hands to the inputs of a body.
    fn formal(&mut self, node: &NodeProto, inputs: &[Option<ValueId>]) -> Vec<Option<Fact>> {
        let graph = &self.building().graph;
        let fact = |input: &Option<ValueId>| Some(graph.value((*input)?).fact.clone());
        match node.op_type.as_str() {
            "Loop" => {
                let scalar = |dtype| Some(Fact::from(TensorFact::new(dtype, [])));
                [scalar(DType::I64), scalar(DType::Bool)].into_iter().chain(inputs.iter().skip(2).map(fact)).collect()
            }
            "SequenceMap" => {
                let element = |input| match fact(input)? {
                    Fact::Sequence(of) => Some(*of),
                    other => Some(other),
                };
                inputs.iter().map(element).collect()
            }
            _ => inputs.iter().map(fact).collect(),
        }
    }

    /// Writes the nodes that compute a `Gradient`.
    fn gradient(
        &mut self,
        node: &'a NodeProto,
        name: &str,
        inputs: &[Option<ValueId>],
        mut attributes: BTreeMap<String, Attribute>,
        place: &str,
    ) -> Result<(), ImportError> {
        let mut strings = |name: &str| match attributes.remove(name) {
            Some(Attribute::Strings(names)) => Ok(names),
            Some(Attribute::String(name)) => Ok(vec![name]),
            None if name == "zs" => Ok(Vec::new()),
            _ => corrupt(place, format!("attribute '{name}' must name tensors")),
        };
        let (xs, zs, y) = (strings("xs")?, strings("zs")?, strings("y")?);
        if let Some(name) = attributes.keys().next() {
            return corrupt(place, format!("has attribute '{name}', which it does not define"));
        }
        if inputs.len() != xs.len() + zs.len() || y.len() != 1 || node.output.len() > xs.len() {
            let (names, given, made) = (xs.len() + zs.len(), inputs.len(), node.output.len());
            return corrupt(place, format!("names {names} arguments; it has {given} inputs and {made} outputs"));
        }
        let mut named = |name: &String| match self.find(self.scopes.len() - 1, name) {
            Some(Some(id)) => Ok(id),
            _ => corrupt(place, format!("names '{name}', which nothing makes")),
        };
        let y = named(&y[0])?;
        let mut arguments = Vec::with_capacity(inputs.len());
        for (name, input) in xs.iter().chain(&zs).zip(inputs) {
            match input {
                Some(given) => arguments.push((named(name)?, *given)),
                None => return corrupt(place, format!("has no value for '{name}'")),
            }
        }
        let outputs: Vec<String> = node.output.iter().map(|given| self.value_name(given)).collect();
        let left = self.reader.options.limits.nodes.saturating_sub(self.nodes);
        let building = self.graphs.last_mut().expect("a graph is being read");
        let (value_names, node_names) = (&mut building.value_names, &mut building.node_names);
        let mut names = || (node_names.fresh(name.to_string()), value_names.fresh(format!("{name}.value")));
        let mut tape = Tape { graph: &mut building.graph, names: &mut names, place, nodes_left: left };
        let made = tape.gradients(y, &arguments, xs.len())?;
        self.nodes += left - tape.nodes_left;
        for ((given, output), id) in
            node.output.iter().zip(outputs).zip(made).filter(|((given, _), _)| !given.is_empty())
        {
            let building = self.building();
            let node = building.node_names.fresh(format!("{name}.{given}"));
            let node = building.graph.add_node(node, Identity.into(), vec![Some(id)], vec![output])?;
            let id = building.graph.node(node).outputs[0];
            self.name_value(given, id, place)?;
        }
        Ok(())
    }

    /// Gives input `at` of a node the trailing axes by which its first axis meets axis `axis` of input 0.
    fn align(
        &mut self,
        inputs: &mut [Option<ValueId>],
        at: usize,
        axis: i64,
        name: &str,
        place: &str,
    ) -> Result<(), ImportError> {
        let (Some(&Some(first)), Some(&Some(aligned))) = (inputs.first(), inputs.get(at)) else { return Ok(()) };
        let building = self.building();
        let rank = |id: ValueId| building.graph.value(id).fact.as_tensor().and_then(TensorFact::rank);
        let (Some(first), Some(rank)) = (rank(first), rank(aligned)) else {
            let message = format!("input {at} meets axis {axis} of input 0, and their ranks are unknown");
            return Err(ImportError::Unsupported { place: place.to_string(), message });
        };
        let Some(axes) = trailing_axes(first, rank, axis) else {
            return corrupt(place, format!("input {at} of {rank} axes cannot meet axis {axis} of {first}"));
        };
        if axes.is_empty() {
            return Ok(());
        }
        let axes = Tensor::from_vec([axes.len()], axes).expect("as many as there are");
        let value = building.value_names.fresh(format!("{name}.axes"));
        let axes = building.graph.add_constant(value, Constant::new(axes));
        let (node, value) = (
            building.node_names.fresh(format!("{name}.aligned")),
            building.value_names.fresh(format!("{name}.aligned{at}")),
        );
        let node = building.graph.add_node(node, Unsqueeze.into(), vec![Some(aligned), Some(axes)], vec![value])?;
        inputs[at] = Some(building.graph.node(node).outputs[0]);
        Ok(())
    }

    /// Inlines `function`: its nodes become nodes of the graph that calls it.
    fn call(
        &mut self,
        function: &'a FunctionProto,
        node: &'a NodeProto,
        name: &str,
        inputs: Vec<Option<ValueId>>,
        place: &str,
    ) -> Result<(), ImportError> {
        let depth = self.reader.options.limits.depth;
        if self.scopes.len() > depth {
            return corrupt(place, format!("functions call one another deeper than {depth}: is this one recursive?"));
        }
        if inputs.len() > function.input.len() || node.output.len() > function.output.len() {
            let (takes, gives) = (function.input.len(), function.output.len());
            return corrupt(place, format!("calls a function that takes {takes} inputs and gives {gives} outputs"));
        }
        let mut attributes: HashMap<&'a str, AttributeProto> =
            function.attribute_proto.iter().map(|a| (a.name.as_str(), a.clone())).collect();
        for attribute in &node.attribute {
            match self.resolve(attribute, place)? {
                Some(resolved) if resolved.r#type == attribute_type::GRAPH => {
                    let message = format!("attribute '{}': a graph handed to a function", attribute.name);
                    return Err(ImportError::Unsupported { place: place.to_string(), message });
                }
                Some(resolved) => drop(attributes.insert(&attribute.name, resolved.into_owned())),
                None => {}
            }
        }
        let inputs = inputs.into_iter().chain(std::iter::repeat(None));
        let values = function.input.iter().cloned().zip(inputs).collect();
        let call = match &self.scope().kind {
            ScopeKind::Function { call } => format!("{call}/{name}"),
            ScopeKind::Graph => name.to_string(),
        };
        let of_function = format!("function '{}.{}'", function.domain, function.name);
        let opsets = Rc::new(opsets(&function.opset_import, &of_function)?);
        self.scopes.push(Scope { values, opsets, attributes: Rc::new(attributes), kind: ScopeKind::Function { call } });
        let known = |name: &str| function.input.iter().any(|input| input == name);
        for index in order(&function.node, known)? {
            self.node(&function.node[index], index)?;
        }
        let scope = self.scopes.pop().expect("pushed above");
        for (inner, outer) in function.output.iter().zip(&node.output).filter(|(_, outer)| !outer.is_empty()) {
            let Some(&Some(id)) = scope.values.get(inner) else {
                return corrupt(of_function, format!("output '{inner}': nothing makes it"));
            };
            // A value keeps the name by which the outermost caller knows it.
            let given = self.value_name(outer);
            let graph = &mut self.building().graph;
            if graph.producer(id).is_some() && !function.input.contains(inner) {
                graph.value_mut(id).name = given;
            }
            self.name_value(outer, id, place)?;
        }
        Ok(())
    }

    /// What a node of this scope calls `given`: in a graph that very name, in a function a fresh one.
    fn value_name(&mut self, given: &str) -> String {
        match &self.scope().kind {
            ScopeKind::Graph => given.to_string(),
            ScopeKind::Function { call } => {
                let name = format!("{call}/{given}");
                self.building().value_names.fresh(name)
            }
        }
    }

    fn name_value(&mut self, name: &str, id: ValueId, place: &str) -> Result<(), ImportError> {
        match self.scope().values.insert(name.to_string(), Some(id)) {
            None => Ok(()),
            Some(_) => corrupt(place, format!("makes '{name}', which is there already: every value is made once")),
        }
    }

    /// The attribute itself, or the one of the function's call that it refers to; `None` where the call left that out.
    fn resolve<'b>(
        &mut self,
        attribute: &'b AttributeProto,
        place: &str,
    ) -> Result<Option<Cow<'b, AttributeProto>>, ImportError> {
        if attribute.ref_attr_name.is_empty() {
            return Ok(Some(Cow::Borrowed(attribute)));
        }
        if !self.scopes.iter().any(|scope| matches!(scope.kind, ScopeKind::Function { .. })) {
            let place = format!("{place}, attribute '{}'", attribute.name);
            return corrupt(place, "refers to an attribute of a function, outside of one");
        }
        let given = self.scope().attributes.get(attribute.ref_attr_name.as_str());
        Ok(given.map(|given| Cow::Owned(AttributeProto { name: attribute.name.clone(), ..given.clone() })))
    }

    fn attribute(&mut self, attribute: &AttributeProto, place: &str) -> Result<Attribute, ImportError> {
        let place = format!("{place}, attribute '{}'", attribute.name);
        let text = |bytes: &Bytes| match std::str::from_utf8(bytes) {
            Ok(text) => Ok(text.to_string()),
            Err(_) => corrupt(place.as_str(), "is not UTF-8"),
        };
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
            attribute_type::GRAPH => return corrupt(place, "is said to be a graph, and none is there"),
            other => {
                let message = format!("attributes of type {other}");
                return Err(ImportError::Unsupported { place, message });
            }
        })
    }

    /// Where inference does not know a value's rank, the declared one is taken. Not the extents: exporters that trace a model declare
    /// those of the example's shapes.
    fn declared(&mut self, graph: &GraphProto) {
        for info in graph.value_info.iter().chain(&graph.output) {
            let Some(&Some(id)) = self.scope().values.get(&info.name) else { continue };
            let Some(declared) = &info.r#type else { continue };
            let Ok(declared) = fact(declared, &info.name, "", self.reader.options.limits.rank) else { continue };
            if let (Fact::Tensor(known), Fact::Tensor(declared)) =
                (&mut self.building().graph.value_mut(id).fact, declared)
                && known.shape.is_none()
                && known.dtype == declared.dtype
            {
                let extent = |axis: usize| Dim::symbol(format!("{}.{axis}", info.name));
                known.shape = declared.rank().map(|rank| (0..rank).map(extent).collect());
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
fn hint(domain: &str, op_type: &str) -> String {
    if domain == "com.microsoft.nchwc" {
        return "; a memory layout of one machine, which ONNX Runtime writes at its optimisation level 'all': save the model at 'extended'"
            .to_string();
    }
    let similar = OPERATOR_NAMES.iter().find(|n| n.rsplit('.').next().is_some_and(|n| n.eq_ignore_ascii_case(op_type)));
    similar.map(|n| format!("; there is {n}")).unwrap_or_default()
}
