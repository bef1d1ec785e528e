//! The order in which a graph's nodes can be read.

use super::{import::GRADIENT, proto::NodeProto};
use crate::{GraphError, ImportError};
use std::collections::{HashMap, HashSet};

/// Every name that `node` uses, the graphs in its attributes included.
fn uses<'b>(node: &'b NodeProto, into: &mut Vec<&'b str>) {
    if (node.domain.as_str(), node.op_type.as_str()) == GRADIENT {
        let named = node.attribute.iter().flat_map(|a| a.strings.iter().chain([&a.s]));
        into.extend(named.filter_map(|name| std::str::from_utf8(name).ok()).filter(|name| !name.is_empty()));
    }
    into.extend(node.input.iter().filter(|i| !i.is_empty()).map(String::as_str));
    for graph in node.attribute.iter().filter_map(|a| a.g.as_ref()) {
        into.extend(graph.output.iter().map(|o| o.name.as_str()));
        graph.node.iter().for_each(|inner| uses(inner, into));
    }
}

/// The nodes in an order in which every value is made before it is used, whatever their order in the file.
pub(super) fn order(nodes: &[NodeProto], known: impl Fn(&str) -> bool) -> Result<Vec<usize>, ImportError> {
    let mut maker: HashMap<&str, usize> = HashMap::new();
    for (index, node) in nodes.iter().enumerate() {
        for output in node.output.iter().filter(|o| !o.is_empty()) {
            maker.insert(output, index);
        }
    }
    let needs = |index: usize| {
        let mut names = Vec::new();
        uses(&nodes[index], &mut names);
        names.iter().filter(|name| !known(name)).filter_map(|name| maker.get(name).copied()).collect::<HashSet<usize>>()
    };
    let mut waiting: Vec<usize> = Vec::with_capacity(nodes.len());
    let mut users: Vec<Vec<usize>> = vec![Vec::new(); nodes.len()];
    for index in 0..nodes.len() {
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
    if order.len() == nodes.len() {
        return Ok(order);
    }
    // Every node left waits for one that is left: following them leads into a cycle.
    let done: HashSet<usize> = order.into_iter().collect();
    let mut node = (0..nodes.len()).find(|i| !done.contains(i)).expect("one is left");
    let mut seen = HashSet::new();
    while seen.insert(node) {
        node = needs(node).into_iter().filter(|n| !done.contains(n)).min().expect("it waits for one that is left");
    }
    let node = &nodes[node];
    let name = if node.name.is_empty() { node.output.first().cloned().unwrap_or_default() } else { node.name.clone() };
    Err(GraphError::Cycle { node: format!("{name}' ('{}", node.op_type) }.into())
}
