//! How an operator's `import` reads an ONNX node.

use super::{Attribute, Wide};
use crate::{Fact, ImportError};
use cutover_tensor::{DType, Tensor};
use std::collections::BTreeMap;

/// One ONNX node while it is read: its attributes are taken one by one, and any left at the end is an error.
#[derive(Debug)]
pub struct NodeReader {
    /// For messages.
    pub node: String,
    /// Without its domain.
    pub op_type: String,
    pub domain: String,
    /// Version of the node's domain that the model imports.
    pub opset: i64,
    /// For each input in order, whether it is there (an empty name is an omitted input).
    pub inputs: Vec<bool>,
    /// Number of outputs that the node names (trailing omitted ones don't count).
    pub outputs: usize,
    attributes: BTreeMap<String, Attribute>,
    constants: Vec<(usize, Tensor)>,
    /// Constants that take the type of the first input.
    numbers: Vec<(usize, f32)>,
    inserted: Vec<usize>,
    aligned: Vec<(usize, i64)>,
    /// The attributes whose graphs were taken, in that order.
    pub(crate) subgraphs: Vec<String>,
    /// Leading inputs that the newest opset does not have.
    removed: usize,
}

impl NodeReader {
    pub fn new(
        node: impl Into<String>,
        domain: impl Into<String>,
        op_type: impl Into<String>,
        opset: i64,
        inputs: Vec<bool>,
        outputs: usize,
        attributes: BTreeMap<String, Attribute>,
    ) -> NodeReader {
        let (node, domain, op_type) = (node.into(), domain.into(), op_type.into());
        let mut attributes = attributes;
        if domain.is_empty() && opset < 6 {
            // How an engine of that time might save memory, which many operators had.
            attributes.remove("consumed_inputs");
        }
        NodeReader {
            node,
            op_type,
            domain,
            opset,
            inputs,
            outputs,
            attributes,
            constants: Vec::new(),
            numbers: Vec::new(),
            inserted: Vec::new(),
            aligned: Vec::new(),
            subgraphs: Vec::new(),
            removed: 0,
        }
    }

    pub fn has_input(&self, index: usize) -> bool {
        self.inputs.get(index).copied().unwrap_or(false)
    }

    pub fn has_attribute(&self, name: &str) -> bool {
        self.attributes.contains_key(name)
    }

    /// Refuses a node with fewer or more inputs; those within may still be omitted.
    pub fn expect_inputs(&self, expected: std::ops::RangeInclusive<usize>) -> Result<(), ImportError> {
        if expected.contains(&self.inputs.len()) {
            return Ok(());
        }
        let (least, most) = expected.into_inner();
        let expected = match most {
            usize::MAX => format!("at least {least}"),
            _ if least == most => least.to_string(),
            _ => format!("{least} to {most}"),
        };
        Err(self.corrupt(format!("has {} inputs, {expected} expected", self.inputs.len())))
    }

    /// A number of things (groups, units), at least 1.
    pub fn count(&mut self, name: &str, default: usize) -> Result<usize, ImportError> {
        match self.optional_int(name)? {
            None => Ok(default),
            Some(value @ 1..=0x7fff_ffff) => Ok(value as usize),
            Some(other) => Err(self.corrupt(format!("attribute '{name}' must be 1 or more, got {other}"))),
        }
    }

    /// Takes the attribute, or `None` where the node does not have it.
    pub fn optional_int(&mut self, name: &str) -> Result<Option<i64>, ImportError> {
        self.take(name, "an integer", |a| if let Attribute::Int(v) = a { Some(v) } else { None })
    }

    pub fn int(&mut self, name: &str, default: i64) -> Result<i64, ImportError> {
        Ok(self.optional_int(name)?.unwrap_or(default))
    }

    /// An integer that ONNX uses as a flag; anything but 0 and 1 is an error.
    pub fn flag(&mut self, name: &str, default: bool) -> Result<bool, ImportError> {
        match self.int(name, default.into())? {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(self.corrupt(format!("attribute '{name}' must be 0 or 1, got {other}"))),
        }
    }

    pub fn optional_float(&mut self, name: &str) -> Result<Option<f32>, ImportError> {
        self.take(name, "a float", |a| if let Attribute::Float(v) = a { Some(v) } else { None })
    }

    pub fn float(&mut self, name: &str, default: f32) -> Result<f32, ImportError> {
        Ok(self.optional_float(name)?.unwrap_or(default))
    }

    pub fn optional_string(&mut self, name: &str) -> Result<Option<String>, ImportError> {
        self.take(name, "a string", |a| if let Attribute::String(v) = a { Some(v) } else { None })
    }

    pub fn string(&mut self, name: &str, default: &str) -> Result<String, ImportError> {
        Ok(self.optional_string(name)?.unwrap_or_else(|| default.to_string()))
    }

    pub fn optional_ints(&mut self, name: &str) -> Result<Option<Vec<i64>>, ImportError> {
        self.take(name, "a list of integers", |a| if let Attribute::Ints(v) = a { Some(v) } else { None })
    }

    pub fn optional_floats(&mut self, name: &str) -> Result<Option<Vec<f32>>, ImportError> {
        self.take(name, "a list of floats", |a| match a {
            Attribute::Floats(v) => Some(v),
            // An empty list has no type in some writers.
            Attribute::Ints(v) if v.is_empty() => Some(Vec::new()),
            _ => None,
        })
    }

    pub fn optional_strings(&mut self, name: &str) -> Result<Option<Vec<String>>, ImportError> {
        self.take(name, "a list of strings", |a| if let Attribute::Strings(v) = a { Some(v) } else { None })
    }

    pub fn optional_tensor(&mut self, name: &str) -> Result<Option<Tensor>, ImportError> {
        self.take(name, "a tensor", |a| if let Attribute::Tensor(v) = a { Some(v) } else { None })
    }

    /// A declared type, such as that of an optional's element.
    pub fn optional_type(&mut self, name: &str) -> Result<Option<Fact>, ImportError> {
        self.take(name, "a type", |a| if let Attribute::Type(v) = a { Some(v) } else { None })
    }

    /// Takes the graph in attribute `name`, which the node must have. What it captures follows the node's inputs, graph after graph in the
    /// order in which they are taken.
    pub fn subgraph(&mut self, name: &str) -> Result<super::Subgraph, ImportError> {
        let graph = self.take(name, "a graph", |a| if let Attribute::Graph(v) = a { Some(v) } else { None })?;
        self.subgraphs.push(name.to_string());
        graph.ok_or_else(|| self.corrupt(format!("attribute '{name}', a graph, is missing")))
    }

    /// Leaves out the first input, which the newest opset does not have.
    pub fn remove_first_input(&mut self) {
        debug_assert!(self.constants.is_empty() && self.inserted.is_empty());
        self.inputs.remove(0);
        self.removed += 1;
    }

    /// Makes input `index`, which the node must not have, the constant `tensor`: how an attribute of an old opset becomes
    /// the input it is today.
    pub fn push_constant(&mut self, index: usize, tensor: Tensor) {
        debug_assert!(!self.has_input(index));
        if self.inputs.len() <= index {
            self.inputs.resize(index + 1, false);
        }
        self.inputs[index] = true;
        self.constants.push((index, tensor));
    }

    /// As [`NodeReader::push_constant`], a scalar of the type of the first input.
    pub fn push_number(&mut self, index: usize, value: f32) {
        self.push_constant(index, Tensor::scalar(value));
        self.numbers.push((index, value));
    }

    /// Makes room for an input that the newest opset has before those of this one: inputs from `index` on move one place up,
    /// and it is omitted. Before any [`NodeReader::push_constant`].
    pub fn insert_omitted_input(&mut self, index: usize) {
        debug_assert!(self.constants.is_empty());
        self.inputs.insert(index, false);
        self.inserted.push(index);
    }

    /// Broadcasts input `index` as opsets before 7 did: its first axis meets axis `axis` of input 0. It gets trailing axes of extent 1.
    pub fn align_input(&mut self, index: usize, axis: i64) {
        self.aligned.push((index, axis));
    }

    /// Which inputs the importer aligns, and with which axis of input 0.
    pub(crate) fn aligned_inputs(&self) -> &[(usize, i64)] {
        &self.aligned
    }

    /// How many leading inputs the importer leaves out, before it inserts any.
    pub(crate) fn removed_inputs(&self) -> usize {
        self.removed
    }

    /// Indices at which the importer leaves an input out, in the order in which they were inserted.
    pub(crate) fn inserted_inputs(&self) -> &[usize] {
        &self.inserted
    }

    /// An error about this node.
    pub fn corrupt(&self, message: impl Into<String>) -> ImportError {
        ImportError::Corrupt { place: self.place(), message: message.into() }
    }

    pub fn unsupported(&self, message: impl Into<String>) -> ImportError {
        ImportError::Unsupported { place: self.place(), message: message.into() }
    }

    /// Ends the reading: the constants that became inputs. `first` is the type of the first input, where it is a tensor.
    pub(crate) fn finish(mut self, first: Option<DType>) -> Result<Vec<(usize, Tensor)>, ImportError> {
        if let Some(name) = self.attributes.keys().next() {
            return Err(self.corrupt(format!("has attribute '{name}', which opset {} does not define", self.opset)));
        }
        for &(index, value) in &self.numbers {
            // Of any other type it is left to the operator to refuse it.
            let wide = match first {
                Some(dtype) if dtype.is_float() => Wide::Float(vec![f64::from(value)]).narrow(dtype, []),
                Some(dtype) if value.fract() == 0.0 => Wide::Int(vec![value as i128]).narrow(dtype, []),
                _ => continue,
            };
            let typed = self.constants.iter_mut().filter(|(at, _)| *at == index);
            typed.zip(wide).for_each(|((_, constant), typed)| *constant = typed);
        }
        Ok(self.constants)
    }

    fn place(&self) -> String {
        format!("node '{}' ({})", self.node, self.op_type)
    }

    fn take<T>(
        &mut self,
        name: &str,
        expected: &str,
        get: impl FnOnce(Attribute) -> Option<T>,
    ) -> Result<Option<T>, ImportError> {
        match self.attributes.remove(name) {
            None => Ok(None),
            Some(attribute) => match get(attribute) {
                Some(value) => Ok(Some(value)),
                None => Err(self.corrupt(format!("attribute '{name}' must be {expected}"))),
            },
        }
    }
}

/// The axes of extent 1 behind those of a value of `rank` that let its first axis meet axis `axis` of one of `first` axes; `None` where there
/// is no such axis, or not enough after it.
pub(crate) fn trailing_axes(first: usize, rank: usize, axis: i64) -> Option<Vec<i64>> {
    if first <= 1 {
        return Some(Vec::new());
    }
    let axis = super::normalize_axis(axis, first).ok()?;
    let trailing = (first - axis).checked_sub(rank)?;
    Some((rank..rank + trailing).map(|axis| axis as i64).collect())
}
