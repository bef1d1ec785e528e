//! Kernels that are generated as WGSL, in CUDA C.
//!
//! naga reads the text and gives every expression its type; what is written here is that module again, expression for expression. The
//! kernel's arrays are members of a struct and its functions are that struct's methods, so that they find them. What C leaves open and
//! WGSL does not (overflow, shifts, division by zero, indices beyond an array) is spelled out. A construct that nothing here writes is an
//! error that names it.

use naga::{
    AddressSpace, ArraySize, Barrier, BinaryOperator, Block, BuiltIn, Expression, Function, GlobalVariable, Handle,
    Literal, MathFunction, Module, Scalar, ScalarKind, Statement, SwitchValue, Type, TypeInner, UnaryOperator,
    front::wgsl,
    proc::TypeResolution,
    valid::{Capabilities, FunctionInfo, ModuleInfo, ValidationFlags, Validator},
};
use std::{collections::BTreeSet, fmt::Write};

/// What every translated kernel begins with.
const PRELUDE: &str = include_str!("prelude.cuh");

/// The name of a translated kernel.
pub(super) const ENTRY: &str = "cutover_kernel";

/// A kernel in CUDA C. Its arguments are, for each binding in order, a pointer and the number of 4-byte words behind it (`unsigned`).
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Translated {
    pub source: String,
    /// Threads of a block.
    pub block: [u32; 3],
}

/// `source`, WGSL with one entry point, in CUDA C.
///
/// # Errors
/// Text that is no WGSL, and what is not written here.
pub(super) fn translate(source: &str) -> Result<Translated, String> {
    let module = wgsl::parse_str(source).map_err(|error| error.emit_to_string(source))?;
    let capabilities = Capabilities::SHADER_FLOAT16 | Capabilities::SHADER_INT64;
    let info = Validator::new(ValidationFlags::all(), capabilities).validate(&module);
    let info = info.map_err(|error| error.emit_to_string(source))?;
    Writer { module: &module, info: &info }.write()
}

struct Writer<'a> {
    module: &'a Module,
    info: &'a ModuleInfo,
}

/// A function as it is written: its text so far, and how deep that is indented.
struct Body<'a> {
    writer: &'a Writer<'a>,
    function: &'a Function,
    info: &'a FunctionInfo,
    text: String,
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

type Text = Result<String, String>;

impl<'a> Writer<'a> {
    fn write(&self) -> Result<Translated, String> {
        let [entry] = self.module.entry_points.as_slice() else { return Err("not one entry point".to_string()) };
        if entry.workgroup_size_overrides.is_some() || !self.module.overrides.is_empty() {
            return Err("an override".to_string());
        }
        let info = self.info.get_entry_point(0);
        let mut called = BTreeSet::new();
        calls(&entry.function.body, self.module, &mut called);
        let is_used = |global: &Handle<GlobalVariable>| {
            !info[*global].is_empty() || self.module.global_variables[*global].binding.is_some()
        };
        let globals: Vec<_> = self.module.global_variables.iter().filter(|(handle, _)| is_used(handle)).collect();

        let (mut members, mut parameters, mut shared, mut set) =
            (String::new(), Vec::new(), String::new(), String::new());
        let mut bindings = Vec::new();
        for &(handle, global) in &globals {
            let name = global_name(handle);
            match global.space {
                AddressSpace::Storage { .. } => {
                    let TypeInner::Array { base, size: ArraySize::Dynamic, .. } = self.module.types[global.ty].inner
                    else {
                        return Err(format!("a binding of {:?}", self.module.types[global.ty].inner));
                    };
                    let of = self.type_name(base)?;
                    let at = global.binding.as_ref().map_or(0, |binding| binding.binding);
                    bindings.push(at);
                    let _ = writeln!(members, "    {of}* {name};\n    unsigned {name}_count;");
                    parameters.push((at, format!("{of}* p{at}, unsigned words{at}")));
                    let _ = writeln!(set, "    kernel.{name} = p{at};");
                    let _ = writeln!(
                        set,
                        "    kernel.{name}_count = (unsigned)((unsigned long long)words{at} * 4 / sizeof({of}));"
                    );
                }
                AddressSpace::WorkGroup => {
                    let (of, count) = match self.module.types[global.ty].inner {
                        TypeInner::Array { base, size: ArraySize::Constant(count), .. } => (base, count.get()),
                        _ => (global.ty, 1),
                    };
                    let of = self.type_name(of)?;
                    let _ = writeln!(members, "    {of}* {name};");
                    let _ = writeln!(shared, "    __shared__ {of} {name}[{count}];");
                    let _ = writeln!(set, "    kernel.{name} = {name};");
                }
                AddressSpace::Private => {
                    let _ = writeln!(members, "    {} {name};", self.type_name(global.ty)?);
                    let value = match global.init {
                        Some(init) => self.constant(init)?,
                        None => self.zero(global.ty)?,
                    };
                    let _ = writeln!(set, "    kernel.{name} = {value};");
                }
                space => return Err(format!("a variable in {space:?}")),
            }
        }
        bindings.sort_unstable();
        if bindings.iter().enumerate().any(|(at, &binding)| at as u32 != binding) {
            return Err("bindings that are not numbered from 0".to_string());
        }
        parameters.sort();

        let mut functions = String::new();
        for (handle, function) in self.module.functions.iter().filter(|(handle, _)| called.contains(handle)) {
            let result = function.result.as_ref().map_or(Ok("void".to_string()), |result| self.type_name(result.ty))?;
            let arguments = function
                .arguments
                .iter()
                .zip(0..)
                .map(|(argument, at)| Ok(format!("{} a{at}", self.type_name(argument.ty)?)));
            let arguments = arguments.collect::<Result<Vec<_>, String>>()?.join(", ");
            let body = self.body(function, &self.info[handle])?;
            let _ = writeln!(
                functions,
                "    __device__ __forceinline__ {result} {}({arguments}) {{\n{body}    }}",
                function_name(function, handle)
            );
        }
        let mut values = Vec::new();
        let mut arguments = Vec::new();
        for (argument, at) in entry.function.arguments.iter().zip(0..) {
            let Some(naga::Binding::BuiltIn(builtin)) = argument.binding else {
                return Err("an argument that is not built in".to_string());
            };
            arguments.push(format!("{} a{at}", self.type_name(argument.ty)?));
            values.push(built_in(builtin)?);
        }
        let body = self.body(&entry.function, info)?;
        let threads: u32 = entry.workgroup_size.iter().product();
        let parameters: Vec<String> = parameters.into_iter().map(|(_, parameter)| parameter).collect();
        let source = format!(
            "{PRELUDE}\nstruct Kernel {{\n{members}{functions}    __device__ __forceinline__ void run({}) {{\n{body}    }}\n}};\n\n}}  // namespace cutover\n\nusing namespace cutover;\n\nextern \"C\" __global__ void __launch_bounds__({threads}) {ENTRY}({}) {{\n{shared}    Kernel kernel;\n{set}    kernel.run({});\n}}\n",
            arguments.join(", "),
            parameters.join(", "),
            values.join(", ")
        );
        Ok(Translated { source, block: entry.workgroup_size })
    }

    fn body(&self, function: &Function, info: &FunctionInfo) -> Text {
        let mut body =
            Body { writer: self, function, info, text: String::new(), depth: 2, loops: Vec::new(), labels: 0 };
        for (handle, local) in function.local_variables.iter() {
            let value = match local.init {
                Some(init) => body.expression(init)?,
                None => self.zero(local.ty)?,
            };
            body.line(&format!("{} v{} = {value};", self.type_name(local.ty)?, handle.index()));
        }
        body.block(&function.body)?;
        Ok(body.text)
    }

    fn type_name(&self, handle: Handle<Type>) -> Text {
        self.inner_name(&self.module.types[handle].inner)
    }

    fn inner_name(&self, inner: &TypeInner) -> Text {
        match *inner {
            TypeInner::Scalar(scalar) => Ok(scalar_name(scalar)?.to_string()),
            TypeInner::Vector { size, scalar } => Ok(format!("vec<{}, {}>", scalar_name(scalar)?, size as u8)),
            TypeInner::Array { base, size: ArraySize::Constant(count), .. } => {
                Ok(format!("array<{}, {count}>", self.type_name(base)?))
            }
            ref other => Err(format!("values of {other:?}")),
        }
    }

    fn zero(&self, handle: Handle<Type>) -> Text {
        let name = self.type_name(handle)?;
        Ok(match self.module.types[handle].inner {
            TypeInner::Scalar(Scalar { width, .. }) if width != 2 => format!("({name})0"),
            _ => format!("{name}{{}}"),
        })
    }

    /// An expression outside of functions.
    fn constant(&self, handle: Handle<Expression>) -> Text {
        match &self.module.global_expressions[handle] {
            Expression::Literal(value) => literal(*value),
            Expression::Constant(of) => self.constant(self.module.constants[*of].init),
            Expression::ZeroValue(ty) => self.zero(*ty),
            Expression::Compose { ty, components } => {
                let parts = components.iter().map(|&part| self.constant(part)).collect::<Result<Vec<_>, _>>()?;
                Ok(format!("{}{{{{{}}}}}", self.type_name(*ty)?, parts.join(", ")))
            }
            Expression::Splat { size, value } => {
                let value = self.constant(*value)?;
                let parts = vec![value; *size as usize].join(", ");
                Ok(format!("{}{{{{{parts}}}}}", self.inner_name(self.info[handle].inner_with(&self.module.types))?))
            }
            other => Err(format!("a constant that is {}", variant(other))),
        }
    }
}

impl Body<'_> {
    fn line(&mut self, line: &str) {
        let _ = writeln!(self.text, "{:width$}{line}", "", width = self.depth * 4);
    }

    fn nested(&mut self, block: &Block) -> Result<(), String> {
        self.depth += 1;
        self.block(block)?;
        self.depth -= 1;
        Ok(())
    }

    fn block(&mut self, block: &Block) -> Result<(), String> {
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
    fn expression(&self, handle: Handle<Expression>) -> Text {
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

fn scalar_name(scalar: Scalar) -> Result<&'static str, String> {
    Ok(match (scalar.kind, scalar.width) {
        (ScalarKind::Sint, 4) => "int",
        (ScalarKind::Uint, 4) => "unsigned",
        (ScalarKind::Sint, 8) => "long long",
        (ScalarKind::Uint, 8) => "unsigned long long",
        (ScalarKind::Float, 4) => "float",
        (ScalarKind::Float, 2) => "half_bits",
        (ScalarKind::Bool, _) => "bool",
        other => return Err(format!("values of {other:?}")),
    })
}

fn literal(value: Literal) -> Text {
    Ok(match value {
        Literal::F32(value) if value.is_finite() => {
            if value.is_sign_negative() {
                format!("({value:?}f)")
            } else {
                format!("{value:?}f")
            }
        }
        Literal::F16(value) => format!("to_half({:?}f)", f32::from(value)),
        Literal::U32(value) => format!("{value}u"),
        Literal::I32(i32::MIN) => "(-2147483647 - 1)".to_string(),
        Literal::I32(value) => format!("({value})"),
        Literal::U64(value) => format!("{value}ull"),
        Literal::I64(i64::MIN) => "(-9223372036854775807ll - 1)".to_string(),
        Literal::I64(value) => format!("({value}ll)"),
        Literal::Bool(value) => value.to_string(),
        other => return Err(format!("the number {other:?}")),
    })
}

fn built_in(builtin: BuiltIn) -> Text {
    Ok(match builtin {
        BuiltIn::GlobalInvocationId => "vec<unsigned, 3>{{blockIdx.x * blockDim.x + threadIdx.x, blockIdx.y * blockDim.y + threadIdx.y, blockIdx.z * blockDim.z + threadIdx.z}}",
        BuiltIn::LocalInvocationId => "vec<unsigned, 3>{{threadIdx.x, threadIdx.y, threadIdx.z}}",
        BuiltIn::LocalInvocationIndex => "(threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x",
        BuiltIn::WorkGroupId => "vec<unsigned, 3>{{blockIdx.x, blockIdx.y, blockIdx.z}}",
        BuiltIn::NumWorkGroups => "vec<unsigned, 3>{{gridDim.x, gridDim.y, gridDim.z}}",
        other => return Err(format!("the argument {other:?}")),
    }
    .to_string())
}

fn global_name(handle: Handle<GlobalVariable>) -> String {
    format!("g{}", handle.index())
}

/// The function's own name, told from C's words and others' by a number.
fn function_name(function: &Function, handle: Handle<Function>) -> String {
    format!("{}_{}", function.name.as_deref().unwrap_or("f"), handle.index())
}

/// The first word of how a construct is printed.
fn variant(value: &impl std::fmt::Debug) -> String {
    format!("{value:?}").chars().take_while(|c| c.is_alphanumeric()).collect()
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

/// The functions that `block` calls, and those that these call.
fn calls(block: &Block, module: &Module, called: &mut BTreeSet<Handle<Function>>) {
    for statement in block.iter() {
        match statement {
            Statement::Call { function, .. } if called.insert(*function) => {
                calls(&module.functions[*function].body, module, called);
            }
            Statement::Block(block) => calls(block, module, called),
            Statement::If { accept, reject, .. } => {
                [accept, reject].into_iter().for_each(|block| calls(block, module, called))
            }
            Statement::Switch { cases, .. } => cases.iter().for_each(|case| calls(&case.body, module, called)),
            Statement::Loop { body, continuing, .. } => {
                [body, continuing].into_iter().for_each(|block| calls(block, module, called))
            }
            _ => {}
        }
    }
}
