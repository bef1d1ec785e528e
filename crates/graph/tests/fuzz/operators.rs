//! Nodes of every operator, with attributes and inputs that somebody made up.

use super::{
    ELEMENTS_MAX,
    cases::{Case, Cases, float, integer, operator},
    options,
    random::Random,
    wire::{Field, Message},
};
use cutover_graph::{
    Bindings, Dim, Fact, Graph, Plan,
    onnx::import_bytes,
    ops::{EvalContext, Inputs, Wide},
    passes::{PassOptions, declutter},
};
use cutover_tensor::{DType, Shape, Tensor, Value};

/// An input of the graph, and how the file says it.
struct Given {
    name: String,
    value: Value,
    fact: Option<Fact>,
    constant: bool,
    declared: Declared,
}

#[derive(Clone, Copy, PartialEq)]
enum Declared {
    Exactly,
    Symbols,
    Type,
}

pub fn attempt(cases: &Cases, random: &mut Random) -> Result<(), String> {
    let (name, case) = cases.pick_operator(random);
    let case = match case {
        Some(case) if !random.one_in(16) => Some(case),
        _ if random.one_in(8) => Some(cases.pick(random)),
        _ => None,
    };
    let (mut model, mut given) = match case {
        Some(case) => of_case(case, random),
        None => of_nothing(name, random),
    };
    if case.is_none() || random.one_in(2) {
        change_node(&mut model, name, cases, random);
    }
    let kept = random.one_in(4);
    for input in &mut given {
        if !kept && random.one_in(2) {
            change_value(&mut input.value, random);
        }
        input.constant = random.one_in(4) && matches!(&input.value, Value::Tensor(_));
        input.declared = *random.of(&[Declared::Exactly, Declared::Exactly, Declared::Symbols, Declared::Type]);
    }
    declare(&mut model, &given);
    let Ok(graph) = import_bytes(model.encode().into(), None, &options()) else { return Ok(()) };
    let Some((inputs, bindings)) = bind(&graph, &given) else { return Ok(()) };
    let Ok(plan) = Plan::new(graph.clone()) else { return Ok(()) };
    let label = |what: String| format!("{}: {what}", case.map_or(name, |case| &case.name));
    let Some(results) = evaluate(&plan, &inputs, &bindings).map_err(label)? else { return Ok(()) };
    // What is evaluated as it is must give the same once it is decluttered.
    let Ok((graph, _)) = declutter(graph, &PassOptions::default()) else { return Ok(()) };
    let Ok(plan) = Plan::new(graph) else { return Ok(()) };
    let again = evaluate(&plan, &inputs, &bindings).map_err(|wrong| label(format!("decluttered, {wrong}")))?;
    match again {
        Some(again) if again.iter().zip(&results).all(|(a, b)| alike(a, b)) => Ok(()),
        Some(again) => Err(label(format!("decluttered gives {} and not {}", brief(&again), brief(&results)))),
        // A limit is met with other intermediate results.
        None => Ok(()),
    }
}

fn brief(values: &[Value]) -> String {
    format!("{values:?}").chars().take(300).collect()
}

/// Whether types and shapes are equal, and what is exact.
fn alike(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Tensor(a), Value::Tensor(b)) if (a.dtype(), a.shape()) == (b.dtype(), b.shape()) => match a.dtype() {
            DType::I64 | DType::I32 | DType::Bool => a.bytes() == b.bytes(),
            _ => true,
        },
        (Value::Tensor(_), Value::Tensor(_)) => false,
        (Value::Sequence(a), Value::Sequence(b)) => a.len() == b.len() && a.iter().zip(b).all(|(a, b)| alike(a, b)),
        _ => a.kind() == b.kind(),
    }
}

fn of_case(case: &Case, random: &mut Random) -> (Message, Vec<Given>) {
    let mut model = case.model.clone();
    let names: Vec<String> = graph_of(&model).messages(11).iter().map(|info| info.text(1)).collect();
    let given = names.into_iter().zip(&case.inputs).map(|(name, (fact, value))| Given {
        name,
        value: value.clone(),
        fact: Some(fact.clone()),
        constant: false,
        declared: Declared::Exactly,
    });
    let given = given.collect();
    if random.one_in(6) {
        set_opset(&mut model, random);
    }
    (model, given)
}

/// A node that has the operator's name and nothing else from anybody.
fn of_nothing(name: &str, random: &mut Random) -> (Message, Vec<Given>) {
    let (domain, op_type) = name.rsplit_once('.').unwrap_or(("", name));
    let mut node = Message::default().with(4, op_type).with(7, domain);
    let mut given = Vec::new();
    for at in 0..random.below(5) {
        let name = format!("in{at}");
        node = node.with(1, name.as_str());
        let value = any_tensor(random).into();
        given.push(Given { name, value, fact: None, constant: false, declared: Declared::Exactly });
    }
    let mut graph = Message::default().with(2, "g");
    for at in 0..1 + random.below(3) {
        let name = format!("out{at}");
        node = node.with(2, name.as_str());
        graph = graph.with(12, Message::default().with(1, name.as_str()));
    }
    let graph = graph.with(1, node);
    let opset = |domain: &str, version: u64| Message::default().with(1, domain).with(2, version);
    let model = Message::default().with(1, 10).with(7, graph).with(8, opset("", 17 + random.below(10) as u64));
    (model.with(8, opset("ai.onnx.ml", 1 + random.below(5) as u64)), given)
}

fn graph_of(model: &Message) -> Message {
    model.messages(7).into_iter().next().unwrap_or_default()
}

fn set_graph(model: &mut Message, graph: Message) {
    model.remove(7);
    model.0.push((7, graph.into()));
}

fn set_opset(model: &mut Message, random: &mut Random) {
    let of = model.messages(8).into_iter().map(|mut opset| {
        opset.remove(2);
        opset.with(2, 1 + random.below(if opset_is_default(model) { 28 } else { 5 }) as u64)
    });
    let of: Vec<Message> = of.collect();
    model.remove(8);
    model.0.extend(of.into_iter().map(|opset| (8, opset.into())));
}

fn opset_is_default(model: &Message) -> bool {
    model.messages(8).iter().all(|opset| opset.text(1).is_empty())
}

fn change_node(model: &mut Message, name: &str, cases: &Cases, random: &mut Random) {
    let mut graph = graph_of(model);
    let places: Vec<usize> = (0..graph.0.len()).filter(|&at| graph.0[at].0 == 1).collect();
    if places.is_empty() {
        return;
    }
    let at = *random.of(&places);
    let Field::Bytes(bytes) = &graph.0[at].1 else { return };
    let Some(mut node) = Message::parse(bytes) else { return };
    for _ in 0..=random.below(2) {
        match random.below(8) {
            0 => change_inputs(&mut node, random),
            1 | 2 => add_attribute(&mut node, name, cases, random),
            _ => change_attribute(&mut node, cases, random),
        }
    }
    graph.0[at].1 = node.into();
    set_graph(model, graph);
}

fn change_inputs(node: &mut Message, random: &mut Random) {
    let places: Vec<usize> = (0..node.0.len()).filter(|&at| matches!(node.0[at].0, 1 | 2)).collect();
    if places.is_empty() {
        return;
    }
    let (at, other) = (*random.of(&places), *random.of(&places));
    match random.below(4) {
        0 => drop(node.0.remove(at)),
        1 if node.0[at].0 == 1 => node.0[at].1 = "".into(),
        2 if node.0[at].0 == node.0[other].0 => node.0.swap(at, other),
        _ if node.0[at].0 == 1 => {
            let copy = node.0[at].clone();
            node.0.push(copy);
        }
        _ => node.0.push((2, format!("more{}", node.0.len()).as_str().into())),
    }
}

/// One that this operator has in another case; or that any other has.
fn add_attribute(node: &mut Message, name: &str, cases: &Cases, random: &mut Random) {
    let own: Vec<&Message> = cases.attributes.iter().filter(|(of, _)| of == name).map(|(_, a)| a).collect();
    let of = operator(node);
    let of: Vec<&Message> = cases.attributes.iter().filter(|(op, _)| *op == of).map(|(_, a)| a).collect();
    let attribute = match (own.is_empty(), of.is_empty()) {
        _ if random.one_in(8) => &random.of(&cases.attributes).1,
        (_, false) => *random.of(&of),
        (false, _) => *random.of(&own),
        _ => &random.of(&cases.attributes).1,
    };
    let name = attribute.text(1);
    let mut node_without = node.clone();
    node_without.0.retain(|(number, field)| {
        *number != 5
            || !matches!(field, Field::Bytes(bytes) if Message::parse(bytes).is_some_and(|a| a.text(1) == name))
    });
    *node = node_without.with(5, attribute.clone());
}

fn change_attribute(node: &mut Message, cases: &Cases, random: &mut Random) {
    let places: Vec<usize> = (0..node.0.len()).filter(|&at| node.0[at].0 == 5).collect();
    if places.is_empty() {
        return add_attribute(node, "", cases, random);
    }
    let at = *random.of(&places);
    if random.one_in(8) {
        node.0.remove(at);
        return;
    }
    let Field::Bytes(bytes) = &node.0[at].1 else { return };
    let Some(attribute) = Message::parse(bytes) else { return };
    let kind = attribute.0.iter().find_map(|(number, field)| match field {
        Field::Varint(kind) if *number == 20 => Some(*kind),
        _ => None,
    });
    let kind = if random.one_in(16) { 1 + random.below(14) as u64 } else { kind.unwrap_or(2) };
    let kept = || Message::default().with(1, attribute.text(1).as_str()).with(20, kind);
    let list = random.below(6);
    let changed = match kind {
        1 => kept().with(2, Field::Four(float(random).to_le_bytes())),
        2 => kept().with(3, integer(random) as u64),
        3 => kept().with(4, random.of(&cases.strings).as_str()),
        6 => (0..list).fold(kept(), |a, _| a.with(7, Field::Four(float(random).to_le_bytes()))),
        7 => {
            let mut values: Vec<u64> = unpacked(&attribute);
            if values.is_empty() || random.one_in(4) {
                values = (0..list).map(|_| integer(random) as u64).collect();
            } else {
                let at = random.below(values.len());
                match random.below(4) {
                    0 => drop(values.remove(at)),
                    1 => values.insert(at, integer(random) as u64),
                    _ => values[at] = integer(random) as u64,
                }
            }
            values.into_iter().fold(kept(), |a, value| a.with(8, value))
        }
        8 => (0..list).fold(kept(), |a, _| a.with(9, random.of(&cases.strings).as_str())),
        4 => kept().with(5, tensor_message("", &any_tensor(random))),
        _ => {
            let mut attribute = attribute.clone();
            super::change(&mut attribute, &random.of(&cases.attributes).1.clone(), random, 0);
            attribute
        }
    };
    node.0[at].1 = changed.into();
}

/// The integers of an attribute, which are packed or not.
fn unpacked(attribute: &Message) -> Vec<u64> {
    let mut values = Vec::new();
    for (number, field) in &attribute.0 {
        match field {
            Field::Varint(value) if *number == 8 => values.push(*value),
            Field::Bytes(bytes) if *number == 8 => {
                // As a message whose every key is one byte that says "field 1, a number".
                let mut rest = bytes.as_slice();
                while !rest.is_empty() {
                    let end = rest.iter().position(|byte| *byte < 0x80).map_or(rest.len(), |at| at + 1);
                    let number = [&[8], &rest[..end]].concat();
                    if let Some(Field::Varint(value)) =
                        Message::parse(&number).and_then(|m| m.0.into_iter().next().map(|f| f.1))
                    {
                        values.push(value);
                    }
                    rest = &rest[end..];
                }
            }
            _ => {}
        }
    }
    values
}

fn any_tensor(random: &mut Random) -> Tensor {
    let rank = *random.of(&[0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 6]);
    let shape: Vec<usize> = (0..rank).map(|_| *random.of(&[0, 1, 1, 2, 2, 3, 4, 5, 7])).collect();
    let usual = [DType::F32, DType::F32, DType::I64, DType::I64, DType::I32, DType::U8, DType::Bool];
    let dtype = if random.one_in(3) { *random.of(DType::ALL) } else { *random.of(&usual) };
    filled(dtype, &shape, random)
}

/// At most a few thousand elements, most of them small.
fn filled(dtype: DType, shape: &[usize], random: &mut Random) -> Tensor {
    let count = Shape::new(shape).checked_len().filter(|&count| count <= 4096);
    let (shape, count) = count.map_or((&[2][..], 2), |count| (shape, count));
    if dtype == DType::String {
        let words = ["", "a", "b", "ab", "é", "1", "-2.5", "nan", "inf", "(a+)+", "a b"];
        let strings = (0..count).map(|_| random.of(&words).to_string()).collect();
        return Tensor::from_strings(shape, strings).expect("as many strings");
    }
    let wild = random.one_in(4);
    let floats: Vec<f64> =
        (0..count).map(|_| if wild { f64::from(float(random)) } else { random.below(9) as f64 - 4.0 }).collect();
    let integers: Vec<i128> =
        (0..count).map(|_| if wild { integer(random).into() } else { random.below(6) as i128 - 1 }).collect();
    let bools = (0..count).map(|_| random.one_in(2)).collect();
    for wide in [Wide::Float(floats), Wide::Int(integers), Wide::Bool(bools)] {
        if let Ok(tensor) = wide.narrow(dtype, shape) {
            return tensor;
        }
    }
    // Complex numbers.
    let bytes: Vec<u8> = (0..dtype.byte_len(count).unwrap_or(0)).map(|_| random.below(64) as u8).collect();
    Tensor::from_bytes(dtype, shape, &bytes).expect("as many bytes")
}

fn change_value(value: &mut Value, random: &mut Random) {
    match value {
        Value::Tensor(tensor) => {
            let (dtype, mut shape) = (tensor.dtype(), tensor.shape().to_vec());
            match random.below(8) {
                0 => *tensor = any_tensor(random),
                1 => *tensor = filled(*random.of(DType::ALL), &shape, random),
                2 | 3 => *tensor = filled(dtype, &shape, random),
                4 => {
                    shape.insert(random.below(shape.len() + 1), *random.of(&[0, 1, 1, 2, 3]));
                    *tensor = filled(dtype, &shape, random);
                }
                5 if !shape.is_empty() => {
                    shape.remove(random.below(shape.len()));
                    *tensor = filled(dtype, &shape, random);
                }
                _ if !shape.is_empty() => {
                    let at = random.below(shape.len());
                    shape[at] = *random.of(&[0, 1, 1, 2, 3, 5, 8, 17, shape[at] + 1, 1 << 40]);
                    *tensor = match Shape::new(&shape).checked_len() {
                        // Without elements an extent may be anything.
                        Some(0) => Tensor::zeros(dtype, shape.as_slice()).unwrap_or_else(|_| any_tensor(random)),
                        _ => filled(dtype, &shape, random),
                    };
                }
                _ => *tensor = filled(dtype, &[random.below(4)], random),
            }
        }
        Value::Sequence(values) => match random.below(4) {
            0 => values.clear(),
            1 if !values.is_empty() => drop(values.pop()),
            _ => values.iter_mut().for_each(|value| change_value(value, random)),
        },
        Value::Optional(value) => match random.below(3) {
            0 => *value = None,
            _ => value.iter_mut().for_each(|value| change_value(value, random)),
        },
        Value::Map { .. } => {}
    }
}

fn tensor_message(name: &str, tensor: &Tensor) -> Message {
    let mut message = Message::default().with(2, tensor.dtype().onnx_code() as u64).with(8, name);
    for &extent in tensor.shape().iter() {
        message = message.with(1, extent as u64);
    }
    match tensor.strings() {
        Ok(strings) => strings.iter().fold(message, |message, text| message.with(6, text.as_str())),
        Err(_) => message.with(9, tensor.bytes().to_vec()),
    }
}

fn type_message(tensor: &Tensor, name: &str, declared: Declared) -> Message {
    let mut of = Message::default().with(1, tensor.dtype().onnx_code() as u64);
    if declared != Declared::Type {
        let dim = |(axis, &extent): (usize, &usize)| match declared {
            Declared::Exactly => Message::default().with(1, extent as u64),
            _ => Message::default().with(2, format!("{name}.{axis}").as_str()),
        };
        let shape =
            tensor.shape().iter().enumerate().map(dim).fold(Message::default(), |shape, dim| shape.with(1, dim));
        of = of.with(2, shape);
    }
    Message::default().with(1, of)
}

/// Replaces what the file says of its inputs, and leaves out what it says of other values.
fn declare(model: &mut Message, given: &[Given]) {
    let mut graph = graph_of(model);
    let declared = graph.messages(11);
    graph.remove(11);
    graph.remove(13);
    for input in given {
        match &input.value {
            Value::Tensor(tensor) if input.constant => graph = graph.with(5, tensor_message(&input.name, tensor)),
            Value::Tensor(tensor) if !matches!(input.fact, Some(Fact::Optional(_) | Fact::Sequence(_))) => {
                let of = type_message(tensor, &input.name, input.declared);
                graph = graph.with(11, Message::default().with(1, input.name.as_str()).with(2, of));
            }
            _ => {
                if let Some(info) = declared.iter().find(|info| info.text(1) == input.name) {
                    graph = graph.with(11, info.clone());
                }
            }
        }
    }
    let outputs: Vec<String> = graph.messages(12).iter().map(|info| info.text(1)).collect();
    graph.remove(12);
    for name in outputs {
        graph = graph.with(12, Message::default().with(1, name.as_str()));
    }
    set_graph(model, graph);
}

/// The values in the order of the graph's inputs, and what its symbols are; `None` where a value is not of the declared type, which a
/// backend tells its caller.
fn bind(graph: &Graph, given: &[Given]) -> Option<(Vec<Value>, Bindings)> {
    let mut bindings = Bindings::new();
    let mut values = Vec::new();
    for &id in graph.inputs() {
        let value = graph.value(id);
        let input = given.iter().find(|input| input.name == value.name)?;
        if let (Fact::Tensor(fact), Value::Tensor(tensor)) = (&value.fact, &input.value) {
            for (dim, &extent) in fact.shape.iter().flatten().zip(tensor.shape().iter()) {
                if let Some(symbol) = dim.as_symbol() {
                    bindings.insert(symbol.clone(), extent as i64);
                }
            }
        }
        fits(&value.fact, &input.value, &bindings).ok()?;
        values.push(input.value.clone());
    }
    Some((values, bindings))
}

/// The graph's outputs; `None` where a node refuses its inputs. What contradicts a fact is an error.
fn evaluate(plan: &Plan, inputs: &[Value], bindings: &Bindings) -> Result<Option<Vec<Value>>, String> {
    let graph = plan.graph();
    let mut values: Vec<Option<Value>> = vec![None; graph.value_count()];
    for (id, value) in graph.inputs().iter().zip(inputs) {
        values[id.index()] = Some(value.clone());
    }
    for (id, _) in graph.values() {
        if let Some(constant) = graph.constant(id) {
            values[id.index()] = Some(constant.tensor.clone().into());
        }
    }
    for &id in plan.order() {
        let node = graph.node(id);
        let context = EvalContext {
            outputs: node.outputs.len(),
            max_elements: ELEMENTS_MAX,
            max_trips: 64,
            ..EvalContext::default()
        };
        let inputs: Vec<Option<&Value>> =
            node.inputs.iter().map(|input| input.and_then(|id| values[id.index()].as_ref())).collect();
        let Ok(results) = node.op.eval(Inputs(&inputs), &context) else { return Ok(None) };
        if results.len() < node.outputs.len() {
            return Ok(None);
        }
        for (&output, value) in node.outputs.iter().zip(results) {
            let fact = &graph.value(output).fact;
            if let Err(how) = fits(fact, &value, bindings) {
                let value: String = format!("{value:?}").chars().take(200).collect();
                return Err(format!("{} gives {value}, inferred was {fact}: {how}", node.op.name()));
            }
            if matches!(&value, Value::Tensor(tensor) if tensor.element_count() > ELEMENTS_MAX) {
                return Err(format!("{} gives more elements than it may", node.op.name()));
            }
            values[output.index()] = Some(value);
        }
    }
    let outputs = graph.outputs().iter().map(|id| values[id.index()].clone());
    Ok(outputs.collect())
}

/// Whether nothing of `value` contradicts `fact`.
fn fits(fact: &Fact, value: &Value, bindings: &Bindings) -> Result<(), &'static str> {
    match (fact, value) {
        (Fact::Tensor(fact), Value::Tensor(tensor)) => {
            if fact.dtype != tensor.dtype() {
                return Err("another type");
            }
            let is = |dim: &Dim, actual: i64| dim.eval(bindings).is_none_or(|known| known == actual);
            let shape = tensor.shape();
            if let Some(dims) = &fact.shape
                && (dims.len() != shape.rank() || !dims.iter().zip(shape.iter()).all(|(dim, &d)| is(dim, d as i64)))
            {
                return Err("another shape");
            }
            let elements: Option<Vec<i64>> = match (Wide::of(tensor), &fact.value) {
                (_, None) => None,
                (Ok(Wide::Int(v)), _) => v.iter().map(|&v| v.try_into().ok()).collect(),
                (Ok(Wide::Bool(v)), _) => Some(v.iter().map(|&v| v.into()).collect()),
                _ => None,
            };
            if let (Some(known), Some(elements)) = (&fact.value, elements)
                && (known.len() != elements.len() || !known.iter().zip(elements).all(|(dim, e)| is(dim, e)))
            {
                return Err("other elements");
            }
            Ok(())
        }
        (Fact::Sequence(of), Value::Sequence(values)) => values.iter().try_for_each(|value| fits(of, value, bindings)),
        (Fact::Optional(of), Value::Optional(value)) => {
            value.as_ref().map_or(Ok(()), |value| fits(of, value, bindings))
        }
        (Fact::Map { .. }, Value::Map { .. }) => Ok(()),
        _ => Err("another kind"),
    }
}
