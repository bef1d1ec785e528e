//! The statements and expressions of one function.

use super::{Text, Writer, function_name, global_name, literal, scalar_name, variant};
use naga::{
    AddressSpace, ArraySize, Barrier, BinaryOperator, Block, Expression, Function, Handle, MathFunction, Scalar,
    ScalarKind, Statement, SwitchValue, TypeInner, UnaryOperator, proc::TypeResolution, valid::FunctionInfo,
};
use std::fmt::Write;

/// A function as it is written: its text so far, and how deep that is indented.
pub(super) struct Body<'a> {
    writer: &'a Writer<'a>,
    function: &'a Function,
    info: &'a FunctionInfo,
    pub text: String,
    depth: usize,
    /// Loops around, each with the label that `continue` jumps to.
    loops: Vec<usize>,
    labels: usize,
}

/// Something that is read from and written to.
struct Place {
    text: String,
    /// What must hold for it to be there.
    guard: Option<String>,
    /// The same where it is always somewhere.
    inside: String,
}

impl<'a> Body<'a> {
    pub fn new(writer: &'a Writer<'a>, function: &'a Function, info: &'a FunctionInfo) -> Body<'a> {
        Body { writer, function, info, text: String::new(), depth: 2, loops: Vec::new(), labels: 0 }
    }

    pub fn line(&mut self, line: &str) {
        let _ = writeln!(self.text, "{:width$}{line}", "", width = self.depth * 4);
    }

    fn nested(&mut self, block: &Block) -> Result<(), String> {
        self.depth += 1;
        self.block(block)?;
        self.depth -= 1;
        Ok(())
    }

    pub fn block(&mut self, block: &Block) -> Result<(), String> {
        block.iter().try_for_each(|statement| self.statement(statement))
    }

    fn statement(&mut self, statement: &Statement) -> Result<(), String> {
        match statement {
            Statement::Emit(range) => {
                for handle in range.clone() {
                    if !self.is_pointer(handle) {
                        let value = self.value_of(handle)?;
                        self.line(&format!("const {} e{} = {value};", self.type_of(handle)?, handle.index()));
                    }
                }
            }
            Statement::Block(block) => {
                self.line("{");
                self.nested(block)?;
                self.line("}");
            }
            Statement::If { condition, accept, reject } => {
                let condition = self.expression(*condition)?;
                self.line(&format!("if ({condition}) {{"));
                self.nested(accept)?;
                if !reject.is_empty() {
                    self.line("} else {");
                    self.nested(reject)?;
                }
                self.line("}");
            }
            Statement::Switch { selector, cases } => {
                let selector = self.expression(*selector)?;
                self.line(&format!("switch ({selector}) {{"));
                for case in cases {
                    match case.value {
                        SwitchValue::I32(value) => self.line(&format!("case {value}: {{")),
                        SwitchValue::U32(value) => self.line(&format!("case {value}u: {{")),
                        SwitchValue::Default => self.line("default: {"),
                    }
                    self.nested(&case.body)?;
                    self.line(if case.fall_through { "}" } else { "} break;" });
                }
                self.line("}");
            }
            Statement::Loop { body, continuing, break_if } => {
                let label = self.labels;
                self.labels += 1;
                let jumps = continues(body);
                self.loops.push(label);
                self.line("for (;;) {");
                if jumps {
                    self.depth += 1;
                    self.line("{");
                    self.nested(body)?;
                    self.line("}");
                    self.depth -= 1;
                    self.line(&format!("next{label}:;"));
                } else {
                    self.nested(body)?;
                }
                self.nested(continuing)?;
                if let Some(condition) = break_if {
                    let condition = self.expression(*condition)?;
                    self.line(&format!("    if ({condition}) break;"));
                }
                self.line("}");
                self.loops.pop();
            }
            Statement::Break => self.line("break;"),
            Statement::Continue => {
                let label = self.loops.last().ok_or("a continue outside of loops")?;
                self.line(&format!("goto next{label};"));
            }
            Statement::Return { value: None } => self.line("return;"),
            Statement::Return { value: Some(value) } => {
                let value = self.expression(*value)?;
                self.line(&format!("return {value};"));
            }
            Statement::ControlBarrier(barrier) if !barrier.intersects(Barrier::SUB_GROUP | Barrier::TEXTURE) => {
                self.line("__syncthreads();")
            }
            Statement::Store { pointer, value } => {
                let (place, value) = (self.place(*pointer)?, self.expression(*value)?);
                let guard = place.guard.map_or(String::new(), |guard| format!("if ({guard}) "));
                self.line(&format!("{guard}{} = {value};", place.text));
            }
            Statement::Call { function, arguments, result } => {
                let arguments =
                    arguments.iter().map(|&argument| self.expression(argument)).collect::<Result<Vec<_>, _>>()?;
                let name = function_name(&self.writer.module.functions[*function], *function);
                let call = format!("{name}({});", arguments.join(", "));
                match result {
                    None => self.line(&call),
                    Some(result) => {
                        self.line(&format!("const {} e{} = {call}", self.type_of(*result)?, result.index()))
                    }
                }
            }
            other => return Err(format!("the statement {}", variant(other))),
        }
        Ok(())
    }

    fn inner(&self, handle: Handle<Expression>) -> &TypeInner {
        let resolution: &TypeResolution = &self.info[handle].ty;
        resolution.inner_with(&self.writer.module.types)
    }

    fn is_pointer(&self, handle: Handle<Expression>) -> bool {
        matches!(self.inner(handle), TypeInner::Pointer { .. } | TypeInner::ValuePointer { .. })
    }

    fn type_of(&self, handle: Handle<Expression>) -> Text {
        self.writer.inner_name(self.inner(handle))
    }

    /// The type of a scalar's elements, or a vector's.
    fn scalar(&self, handle: Handle<Expression>) -> Result<Scalar, String> {
        match *self.inner(handle) {
            TypeInner::Scalar(scalar) | TypeInner::Vector { scalar, .. } => Ok(scalar),
            ref other => Err(format!("arithmetic of {other:?}")),
        }
    }

    fn is_vector(&self, handle: Handle<Expression>) -> bool {
        matches!(self.inner(handle), TypeInner::Vector { .. })
    }

    /// The name of what was computed, or what needs no computing.
    pub fn expression(&self, handle: Handle<Expression>) -> Text {
        match &self.function.expressions[handle] {
            Expression::Literal(_)
            | Expression::Constant(_)
            | Expression::ZeroValue(_)
            | Expression::FunctionArgument(_) => self.value_of(handle),
            // Compositions of constants are never emitted.
            Expression::Compose { components, .. } if components.iter().all(|&part| self.is_constant(part)) => {
                self.value_of(handle)
            }
            Expression::Splat { value, .. } if self.is_constant(*value) => self.value_of(handle),
            _ => Ok(format!("e{}", handle.index())),
        }
    }

    fn is_constant(&self, handle: Handle<Expression>) -> bool {
        match &self.function.expressions[handle] {
            Expression::Literal(_) | Expression::Constant(_) | Expression::ZeroValue(_) => true,
            Expression::Compose { components, .. } => components.iter().all(|&part| self.is_constant(part)),
            Expression::Splat { value, .. } => self.is_constant(*value),
            _ => false,
        }
    }

    /// How an expression is computed.
    fn value_of(&self, handle: Handle<Expression>) -> Text {
        match &self.function.expressions[handle] {
            Expression::Literal(value) => literal(*value),
            Expression::Constant(of) => self.writer.constant(self.writer.module.constants[*of].init),
            Expression::ZeroValue(ty) => self.writer.zero(*ty),
            Expression::FunctionArgument(at) => Ok(format!("a{at}")),
            Expression::Compose { ty, components } => {
                if components.iter().any(|&part| self.is_vector(part)) {
                    return Err("a vector made of vectors".to_string());
                }
                let parts = components.iter().map(|&part| self.expression(part)).collect::<Result<Vec<_>, _>>()?;
                Ok(format!("{}{{{{{}}}}}", self.writer.type_name(*ty)?, parts.join(", ")))
            }
            Expression::Splat { size, value } => {
                let value = self.expression(*value)?;
                Ok(format!("{}{{{{{}}}}}", self.type_of(handle)?, vec![value; *size as usize].join(", ")))
            }
            Expression::Swizzle { size, vector, pattern } => {
                let vector = self.expression(*vector)?;
                let parts = pattern.iter().take(*size as usize).map(|&part| format!("{vector}.v[{}]", part as u8));
                Ok(format!("{}{{{{{}}}}}", self.type_of(handle)?, parts.collect::<Vec<_>>().join(", ")))
            }
            Expression::AccessIndex { base, index } => Ok(format!("{}.v[{index}]", self.expression(*base)?)),
            Expression::Access { base, index } => {
                let count = match *self.inner(*base) {
                    TypeInner::Vector { size, .. } => size as u32,
                    TypeInner::Array { size: ArraySize::Constant(count), .. } => count.get(),
                    ref other => return Err(format!("an element of {other:?}")),
                };
                let (base, index) = (self.expression(*base)?, self.expression(*index)?);
                Ok(format!("{base}.v[within({index}, {count}u)]"))
            }
            Expression::Load { pointer } => Ok(self.place(*pointer)?.inside),
            Expression::Unary { op, expr } => {
                let (scalar, value) = (self.scalar(*expr)?, self.expression(*expr)?);
                Ok(match (op, scalar.kind) {
                    (UnaryOperator::Negate, ScalarKind::Float) => format!("-{value}"),
                    (UnaryOperator::Negate, ScalarKind::Sint) if !self.is_vector(*expr) => format!("negated({value})"),
                    (UnaryOperator::LogicalNot, _) if !self.is_vector(*expr) => format!("!{value}"),
                    (UnaryOperator::BitwiseNot, _) if !self.is_vector(*expr) => format!("~{value}"),
                    (op, kind) => return Err(format!("{op:?} of {kind:?}")),
                })
            }
            Expression::Binary { op, left, right } => self.binary(*op, *left, *right),
            Expression::Select { condition, accept, reject } => {
                if self.is_vector(*condition) {
                    return Err("a choice by a vector".to_string());
                }
                let [condition, accept, reject] =
                    [self.expression(*condition)?, self.expression(*accept)?, self.expression(*reject)?];
                Ok(format!("{condition} ? {accept} : {reject}"))
            }
            Expression::As { expr, kind, convert } => self.conversion(handle, *expr, *kind, convert.is_some()),
            Expression::Math { fun, arg, arg1, arg2, arg3: None } => self.math(*fun, *arg, *arg1, *arg2),
            Expression::ArrayLength(pointer) => match self.function.expressions[*pointer] {
                Expression::GlobalVariable(global) => Ok(format!("{}_count", global_name(global))),
                _ => Err("the length of a part".to_string()),
            },
            other => Err(format!("the expression {}", variant(other))),
        }
    }

    fn binary(&self, op: BinaryOperator, left: Handle<Expression>, right: Handle<Expression>) -> Text {
        use BinaryOperator as Op;
        let scalar = self.scalar(left)?;
        let is_vector = self.is_vector(left) || self.is_vector(right);
        let (a, b) = (self.expression(left)?, self.expression(right)?);
        if scalar.kind == ScalarKind::Float && scalar.width != 4 {
            return Err("arithmetic of f16".to_string());
        }
        let of_vectors = matches!(op, Op::Add | Op::Subtract | Op::Multiply)
            || (op == Op::Divide && scalar.kind == ScalarKind::Float);
        if is_vector && (!of_vectors || scalar.kind == ScalarKind::Sint) {
            return Err(format!("{op:?} of vectors of {:?}", scalar.kind));
        }
        let plain = |symbol: &str| Ok(format!("{a} {symbol} {b}"));
        let called = |name: &str| Ok(format!("{name}({a}, {b})"));
        match (op, scalar.kind) {
            (Op::Add, ScalarKind::Sint) => called("sum"),
            (Op::Subtract, ScalarKind::Sint) => called("difference"),
            (Op::Multiply, ScalarKind::Sint) => called("product"),
            (Op::Add, _) => plain("+"),
            (Op::Subtract, _) => plain("-"),
            (Op::Multiply, _) => plain("*"),
            (Op::Divide, ScalarKind::Float) => plain("/"),
            (Op::Modulo, ScalarKind::Float) => called("fmodf"),
            (Op::Divide, _) => called("quotient"),
            (Op::Modulo, _) => called("remainder"),
            (Op::Equal, _) => plain("=="),
            (Op::NotEqual, _) => plain("!="),
            (Op::Less, _) => plain("<"),
            (Op::LessEqual, _) => plain("<="),
            (Op::Greater, _) => plain(">"),
            (Op::GreaterEqual, _) => plain(">="),
            // Of bools, as of words.
            (Op::And, _) => plain("&"),
            (Op::InclusiveOr, _) => plain("|"),
            (Op::ExclusiveOr, _) => plain("^"),
            (Op::LogicalAnd, _) => plain("&&"),
            (Op::LogicalOr, _) => plain("||"),
            (Op::ShiftLeft, _) => called("shifted_left"),
            (Op::ShiftRight, _) => called("shifted_right"),
        }
    }

    fn conversion(&self, handle: Handle<Expression>, of: Handle<Expression>, to: ScalarKind, converts: bool) -> Text {
        let (from, value) = (self.scalar(of)?, self.expression(of)?);
        let result = self.scalar(handle)?;
        if self.is_vector(of) {
            return Err("a conversion of vectors".to_string());
        }
        let name = scalar_name(result)?;
        if !converts {
            return match (from.width, result.width) {
                (4, 4) => Ok(format!("bits<{name}>({value})")),
                (8, 8) => Ok(format!("({name}){value}")),
                widths => Err(format!("the bits of {widths:?} bytes")),
            };
        }
        Ok(match (from.kind, to) {
            (ScalarKind::Bool, ScalarKind::Float) if result.width == 2 => format!("to_half({value} ? 1.0f : 0.0f)"),
            (ScalarKind::Bool, _) => format!("({name})({value} ? 1 : 0)"),
            (ScalarKind::Float, _) if from.width == 2 => {
                if (to, result.width) != (ScalarKind::Float, 4) {
                    return Err("a conversion of f16".to_string());
                }
                format!("from_half({value})")
            }
            (_, ScalarKind::Bool) => format!("{value} != 0"),
            (ScalarKind::Float, ScalarKind::Float) if result.width == 2 => format!("to_half({value})"),
            (ScalarKind::Float, ScalarKind::Float) => value,
            (ScalarKind::Float, _) => format!("truncated<{name}>({value})"),
            (_, ScalarKind::Float) if result.width == 2 => format!("to_half((float){value})"),
            _ => format!("({name}){value}"),
        })
    }

    fn math(
        &self,
        function: MathFunction,
        arg: Handle<Expression>,
        arg1: Option<Handle<Expression>>,
        arg2: Option<Handle<Expression>>,
    ) -> Text {
        use MathFunction as Math;
        let scalar = self.scalar(arg)?;
        let arguments = [Some(arg), arg1, arg2].into_iter().flatten().map(|argument| self.expression(argument));
        let arguments = arguments.collect::<Result<Vec<_>, _>>()?.join(", ");
        if scalar.kind == ScalarKind::Float && scalar.width != 4 {
            return Err(format!("{function:?} of f16"));
        }
        // As overloads of the prelude.
        let named = match function {
            Math::Abs => "magnitude",
            Math::Min => "least",
            Math::Max => "greatest",
            Math::Clamp => "clamped",
            Math::Sign => "sign",
            Math::Fma => "fused",
            Math::Dot => "dot",
            _ => "",
        };
        if !named.is_empty() {
            return Ok(format!("{named}({arguments})"));
        }
        if self.is_vector(arg) {
            return Err(format!("{function:?} of vectors"));
        }
        let name = match function {
            Math::Dot4I8Packed => "dot_i8",
            Math::Dot4U8Packed => "dot_u8",
            Math::CountOneBits => "ones",
            _ if scalar.kind != ScalarKind::Float => return Err(format!("{function:?} of {:?}", scalar.kind)),
            Math::Saturate => "saturated",
            Math::Ceil => "ceilf",
            Math::Floor => "floorf",
            // To the even one of two that are as near.
            Math::Round => "rintf",
            Math::Trunc => "truncf",
            Math::Fract => "fraction",
            Math::Sqrt => "sqrtf",
            Math::InverseSqrt => "1.0f / sqrtf",
            Math::Exp => "expf",
            Math::Exp2 => "exp2f",
            Math::Log => "logf",
            Math::Log2 => "log2f",
            Math::Pow => "powf",
            Math::Sin => "sinf",
            Math::Cos => "cosf",
            Math::Tan => "tanf",
            Math::Tanh => "tanhf",
            Math::Mix => "mixed",
            other => return Err(format!("the function {other:?}")),
        };
        Ok(format!("{name}({arguments})"))
    }

    fn place(&self, pointer: Handle<Expression>) -> Result<Place, String> {
        let always = |text: String| Place { inside: text.clone(), text, guard: None };
        match &self.function.expressions[pointer] {
            Expression::LocalVariable(handle) => Ok(always(format!("v{}", handle.index()))),
            Expression::GlobalVariable(handle) => {
                let global = &self.writer.module.global_variables[*handle];
                let is_array = matches!(self.writer.module.types[global.ty].inner, TypeInner::Array { .. });
                match global.space {
                    // Of one element.
                    AddressSpace::WorkGroup if !is_array => Ok(always(format!("{}[0]", global_name(*handle)))),
                    AddressSpace::WorkGroup | AddressSpace::Storage { .. } if is_array => {
                        Err("an array as a whole".to_string())
                    }
                    AddressSpace::Private => Ok(always(global_name(*handle))),
                    space => Err(format!("a variable in {space:?}")),
                }
            }
            Expression::Access { base, index } => {
                let index = self.expression(*index)?;
                self.element(*base, &index)
            }
            Expression::AccessIndex { base, index } => self.element(*base, &format!("{index}u")),
            other => Err(format!("a pointer that is {}", variant(other))),
        }
    }

    fn element(&self, base: Handle<Expression>, index: &str) -> Result<Place, String> {
        let types = &self.writer.module.types;
        if let Expression::GlobalVariable(handle) = self.function.expressions[base] {
            let (global, name) = (&self.writer.module.global_variables[handle], global_name(handle));
            let count = match (global.space, &types[global.ty].inner) {
                (AddressSpace::Storage { .. }, TypeInner::Array { .. }) => Some(format!("{name}_count")),
                (AddressSpace::WorkGroup, TypeInner::Array { size: ArraySize::Constant(count), .. }) => {
                    Some(format!("{count}u"))
                }
                _ => None,
            };
            if let Some(count) = count {
                return Ok(Place {
                    text: format!("{name}[{index}]"),
                    guard: Some(format!("(unsigned){index} < {count}")),
                    inside: format!("{name}[within({index}, {count})]"),
                });
            }
        }
        let count = match self.inner(base) {
            TypeInner::Pointer { base, .. } => match types[*base].inner {
                TypeInner::Array { size: ArraySize::Constant(count), .. } => count.get(),
                TypeInner::Vector { size, .. } => size as u32,
                ref other => return Err(format!("an element of {other:?}")),
            },
            TypeInner::ValuePointer { size: Some(size), .. } => *size as u32,
            other => return Err(format!("an element of {other:?}")),
        };
        let base = self.place(base)?;
        let guard = format!("(unsigned){index} < {count}u");
        Ok(Place {
            text: format!("{}.v[{index}]", base.text),
            guard: Some(base.guard.map_or(guard.clone(), |outer| format!("{outer} && {guard}"))),
            inside: format!("{}.v[within({index}, {count}u)]", base.inside),
        })
    }
}

/// Whether a `continue` of this block's loop is in it.
fn continues(block: &Block) -> bool {
    block.iter().any(|statement| match statement {
        Statement::Continue => true,
        Statement::Block(block) => continues(block),
        Statement::If { accept, reject, .. } => continues(accept) || continues(reject),
        Statement::Switch { cases, .. } => cases.iter().any(|case| continues(&case.body)),
        _ => false,
    })
}
