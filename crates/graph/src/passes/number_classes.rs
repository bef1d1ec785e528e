//! Classifiers that name their classes number them, and a table gives the names.
//!
//! Scores and numbers are then computed where strings can't be.

use super::{Pass, Subject};
use crate::{
    NodeId, Op, Patch, PatchNode, PatchValue,
    ops::{ClassLabels, EnsembleOutput, LabelEncoder, LinearOutput, SvmMachine},
};
use cutover_tensor::{Shape, Tensor};

pub(super) struct NumberClasses;

impl Pass for NumberClasses {
    fn name(&self) -> &'static str {
        "number-classes"
    }

    fn propose(&self, subject: &Subject, id: NodeId) -> Option<Patch> {
        let node = subject.node(id);
        let mut op = node.op.clone();
        let labels = match &mut op {
            Op::TreeEnsemble(op) => match &mut op.output {
                EnsembleOutput::Classification(classes) => &mut classes.labels,
                _ => return None,
            },
            Op::Linear(op) => match &mut op.output {
                LinearOutput::Classification(labels) => labels,
                LinearOutput::Regression => return None,
            },
            Op::Svm(op) => match &mut op.machine {
                SvmMachine::Classes { labels, .. } => labels,
                SvmMachine::Pairs(pairs) => &mut pairs.labels,
                SvmMachine::Regression { .. } => return None,
            },
            _ => return None,
        };
        let ClassLabels::Strings(names) = labels.clone() else { return None };
        let count = names.len();
        *labels = ClassLabels::Ints((0..count as i64).collect());
        let last = names.last()?.clone();
        let table = LabelEncoder {
            keys: Tensor::from_vec([count], (0..count as i64).collect()).ok()?,
            values: Tensor::from_strings([count], names.to_vec()).ok()?,
            // Of one class the number may be 1.
            default: Tensor::from_strings(Shape::scalar(), vec![last]).ok()?,
        };
        let mut patch = Patch::new();
        let inputs = node.inputs.iter().map(|input| input.map(PatchValue::from)).collect();
        patch.nodes.push(PatchNode { name: node.name.clone(), op, inputs, outputs: node.outputs.len() });
        let output = |output| PatchValue::Node { node: 0, output };
        let named = patch.node(format!("{}.names", node.name), table, &[Some(output(0))]);
        patch.replace(node.outputs[0], named);
        for (index, &scores) in node.outputs.iter().enumerate().skip(1) {
            patch.replace(scores, output(index));
        }
        Some(patch)
    }
}
