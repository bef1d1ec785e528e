//! Kernels that are generated as WGSL, in CUDA C.
//!
//! naga reads the text and gives every expression its type; what is written here is that module again, expression for expression. The
//! kernel's arrays are members of a struct and its functions are that struct's methods, so that they find them. What C leaves open and
//! WGSL does not (overflow, shifts, division by zero, indices beyond an array) is spelled out. A construct that nothing here writes is an
//! error that names it.

use cutover_kernels::cuda::Functions;
use naga::{
    AddressSpace, ArraySize, Block, BuiltIn, Expression, Function, GlobalVariable, Handle, Literal, Module, Scalar,
    ScalarKind, Statement, Type, TypeInner,
    front::wgsl,
    valid::{Capabilities, FunctionInfo, ModuleInfo, ValidationFlags, Validator},
};
use std::{collections::BTreeSet, fmt::Write};

mod body;

use body::Body;

/// What every translated kernel begins with.
const PRELUDE: &str = include_str!("prelude.cuh");

/// The name of a translated kernel.
pub(super) const ENTRY: &str = "cutover_kernel";

/// What kernels written by hand call, as [`cutover_kernels::cuda`] says of each family.
const CALLED: [&str; 15] = [
    "finish",
    "x_at",
    "a_at",
    "b_at",
    "mask_at",
    "gate",
    "recurrent_bias",
    "initial",
    "initial_cell",
    "peephole",
    "length_of",
    "is_reverse",
    "activate",
    "put",
    "put_last",
];

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
    let (module, info) = parsed(source)?;
    Writer { module: &module, info: &info }.write()
}

/// The functions of `source` that kernels written by hand call (those of [`CALLED`] that it has), as they call them. Its bindings, which have
/// `counts` elements, are further members of their operands.
///
/// # Errors
/// As [`translate`]; a text with none of these functions.
pub(super) fn functions(source: &str, counts: &[usize]) -> Result<Functions, String> {
    let (module, info) = parsed(source)?;
    Writer { module: &module, info: &info }.write_functions(counts)
}

fn parsed(source: &str) -> Result<(Module, ModuleInfo), String> {
    let module = wgsl::parse_str(source).map_err(|error| error.emit_to_string(source))?;
    let capabilities = Capabilities::SHADER_FLOAT16 | Capabilities::SHADER_INT64;
    let info = Validator::new(ValidationFlags::all(), capabilities).validate(&module);
    let info = info.map_err(|error| error.emit_to_string(source))?;
    Ok((module, info))
}

struct Writer<'a> {
    module: &'a Module,
    info: &'a ModuleInfo,
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

        let functions = self.functions(&called)?;
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

    fn write_functions(&self, counts: &[usize]) -> Result<Functions, String> {
        let (mut members, mut numbers, mut arrays, mut pointers) =
            (String::new(), String::new(), String::new(), Vec::new());
        for (handle, global) in self.module.global_variables.iter() {
            let name = global_name(handle);
            match (global.space, &self.module.types[global.ty].inner, &global.binding) {
                (AddressSpace::Private, _, _) => {
                    let value = match global.init {
                        Some(init) => self.constant(init)?,
                        None => self.zero(global.ty)?,
                    };
                    let _ = writeln!(members, "    {} {name};", self.type_name(global.ty)?);
                    let _ = writeln!(numbers, "    caller.{name} = {value};");
                }
                (
                    AddressSpace::Storage { .. },
                    TypeInner::Array { base, size: ArraySize::Dynamic, .. },
                    Some(binding),
                ) => {
                    let at = binding.binding as usize;
                    let count = counts.get(at).ok_or("a binding of unknown length")?;
                    let of = self.type_name(*base)?;
                    let _ = writeln!(members, "    {of}* {name};\n    unsigned {name}_count;");
                    let _ = writeln!(
                        arrays,
                        "    caller.{name} = (decltype(caller.{name}))o.extra{at};\n    caller.{name}_count = {count}u;"
                    );
                    pointers.push((at, ("void*".to_string(), format!("extra{at}"))));
                }
                (space, ..) => return Err(format!("a variable in {space:?}")),
            }
        }
        pointers.sort();
        let is_called = |function: &Function| {
            let name = function.name.as_deref().unwrap_or_default();
            CALLED.contains(&name.trim_end_matches(|c: char| c.is_ascii_digit()))
        };
        let asked: Vec<_> = self.module.functions.iter().filter(|(_, function)| is_called(function)).collect();
        if asked.is_empty() {
            return Err("no function that kernels call".to_string());
        }
        let mut called: BTreeSet<_> = asked.iter().map(|(handle, _)| *handle).collect();
        asked.iter().for_each(|(_, function)| calls(&function.body, self.module, &mut called));
        let methods = self.functions(&called)?;
        let mut text = format!("{PRELUDE}\nstruct Caller {{\n{members}{methods}}};\n\n}}  // namespace cutover\n");
        for (handle, function) in asked {
            let result = self.result_name(function)?;
            let (arguments, values) = self.arguments(function)?;
            let name = function.name.as_deref().unwrap_or_default();
            let call = format!("caller.{}({values})", function_name(function, handle));
            let separator = if arguments.is_empty() { "" } else { ", " };
            let head = format!("__device__ __forceinline__ {result} {name}(");
            let _ = writeln!(
                text,
                "{head}const Operands& o{separator}{arguments}) {{\n    cutover::Caller caller;\n{numbers}{arrays}    return {call};\n}}"
            );
            // What reads nothing is asked without operands, too.
            let info = &self.info[handle];
            let is_array = |global: &GlobalVariable| matches!(global.space, AddressSpace::Storage { .. });
            let mut globals = self.module.global_variables.iter();
            if globals.all(|(global, of)| !is_array(of) || info[global].is_empty()) {
                let _ = writeln!(
                    text,
                    "{head}{arguments}) {{\n    cutover::Caller caller;\n{numbers}    return {call};\n}}"
                );
            }
        }
        Ok(Functions { pointers: pointers.into_iter().map(|(_, pointer)| pointer).collect(), text })
    }

    fn result_name(&self, function: &Function) -> Text {
        function.result.as_ref().map_or(Ok("void".to_string()), |result| self.type_name(result.ty))
    }

    /// A function's parameters, and their names alone.
    fn arguments(&self, function: &Function) -> Result<(String, String), String> {
        let arguments = function.arguments.iter().zip(0..);
        let declared = arguments.map(|(argument, at)| Ok(format!("{} a{at}", self.type_name(argument.ty)?)));
        let declared = declared.collect::<Result<Vec<_>, String>>()?.join(", ");
        let names: Vec<String> = (0..function.arguments.len()).map(|at| format!("a{at}")).collect();
        Ok((declared, names.join(", ")))
    }

    /// The functions that are called, as methods.
    fn functions(&self, called: &BTreeSet<Handle<Function>>) -> Text {
        let mut functions = String::new();
        for (handle, function) in self.module.functions.iter().filter(|(handle, _)| called.contains(handle)) {
            let (result, (arguments, _)) = (self.result_name(function)?, self.arguments(function)?);
            let (body, name) = (self.body(function, &self.info[handle])?, function_name(function, handle));
            let _ = writeln!(functions, "    __device__ __forceinline__ {result} {name}({arguments}) {{\n{body}    }}");
        }
        Ok(functions)
    }

    fn body(&self, function: &Function, info: &FunctionInfo) -> Text {
        let mut body = Body::new(self, function, info);
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

#[cfg(test)]
mod tests {
    use super::*;

    fn kernel(statements: &str) -> Result<Translated, String> {
        translate(&format!(
            "@group(0) @binding(0) var<storage, read_write> x: array<i32>;\n@group(0) @binding(1) var<storage, read_write> n: atomic<u32>;\n@compute @workgroup_size(8, 2)\nfn main(@builtin(global_invocation_id) at: vec3<u32>) {{\n{statements}\n}}"
        ))
    }

    fn plain(statements: &str) -> Result<Translated, String> {
        translate(&format!(
            "@group(0) @binding(0) var<storage, read_write> x: array<i32>;\n@compute @workgroup_size(8, 2)\nfn main(@builtin(global_invocation_id) at: vec3<u32>) {{\n{statements}\n}}"
        ))
    }

    #[test]
    fn what_c_leaves_open_is_spelled_out() {
        for (statement, expected) in [
            ("x[at.x] = x[at.x] + 1;", "sum("),
            ("x[at.x] = x[at.x] / x[0];", "quotient("),
            ("x[at.x] = x[at.x] % x[0];", "remainder("),
            ("x[at.x] = x[at.x] << at.y;", "shifted_left("),
            ("x[at.x] = i32(f32(x[at.x]) * 0.5);", "truncated<int>("),
            ("x[at.x] = x[at.y];", "[within("),
            ("x[at.x] = 1;", "< g0_count) g0["),
            ("x[0] = -2147483647 - 1;", "(-2147483647 - 1)"),
        ] {
            let Translated { source, block } = plain(statement).unwrap();
            let own = source.split("struct Kernel").nth(1).unwrap();
            assert!(own.contains(expected), "{statement}: {own}");
            assert_eq!(block, [8, 2, 1]);
        }
    }

    #[test]
    fn what_is_not_written_is_named() {
        let error = kernel("atomicAdd(&n, 1u);").unwrap_err();
        assert!(error.contains("a binding of"), "{error}");
        for (statement, expected) in [
            ("let m = mat2x2<f32>(1.0, 0.0, 0.0, f32(at.x)); x[0] = i32(m[0][0]);", "a vector made of vectors"),
            ("x[0] = i32(ldexp(f32(at.x), 2));", "Ldexp"),
            ("x[0] = firstTrailingBit(x[1]);", "FirstTrailingBit"),
        ] {
            let error = plain(statement).unwrap_err();
            assert!(error.contains(expected), "{statement}: {error}");
        }
        assert!(plain("x[0] = ;").unwrap_err().contains("error"));
    }

    #[test]
    fn kernels_written_by_hand_call_what_they_know() {
        let text = "@group(0) @binding(0) var<storage, read> b0: array<f32>;\nfn finish(i: u32, channel: u32, sum: f32) -> f32 { return max(sum + b0[channel], 0.0); }\nfn activate0(x: f32, d: u32) -> f32 { return x * 2.0; }";
        let Functions { pointers, text } = functions(text, &[12]).unwrap();
        assert_eq!(pointers, [("void*".to_string(), "extra0".to_string())]);
        assert!(text.contains("float finish(const Operands& o, unsigned a0, unsigned a1, float a2)"), "{text}");
        assert!(!text.contains("float finish(unsigned a0"), "{text}");
        assert!(text.contains("float activate0(float a0, unsigned a1)"), "{text}");
        assert!(text.contains("g0_count = 12u"), "{text}");
        assert!(functions("fn other() {}", &[]).is_err());
    }
}
