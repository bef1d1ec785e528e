//! Ranges of memory as textures, for devices on which a kernel reads those many times faster.
//!
//! Mesa's llvmpipe reads a storage buffer one invocation at a time, with a branch for each; a texture's elements it gathers. What a kernel
//! reads of the arena is copied into a texture before it runs, a constant once.

use super::gpu::Gpu;
use crate::{
    ResourceError,
    gpu::{Beside, Place, Ready, TEXELS_IN_ROW, lock},
};
use ::wgpu::{self as api, TextureFormat};
use std::sync::Mutex;

/// A constant, and the textures that kernels read it through.
pub(super) struct Constant {
    pub buffer: api::Buffer,
    pub textures: Mutex<Vec<(TextureFormat, api::TextureView)>>,
}

/// The texture that binding `at` of a kernel is, `None` for a buffer.
pub(super) fn format_of(source: &str, at: usize) -> Option<TextureFormat> {
    let head = format!("@binding({at}) var b{at}: texture_storage_2d<");
    let declared = &source[source.find(&head)? + head.len()..];
    Some(match declared.split(',').next()? {
        "r32float" => TextureFormat::R32Float,
        "r32sint" => TextureFormat::R32Sint,
        "r32uint" => TextureFormat::R32Uint,
        _ => TextureFormat::Rgba32Float,
    })
}

fn texel_bytes(format: TextureFormat) -> u64 {
    if format == TextureFormat::Rgba32Float { 16 } else { 4 }
}

/// Rows of a texture that holds `bytes`.
fn rows(format: TextureFormat, bytes: u64) -> u32 {
    bytes.div_ceil(texel_bytes(format) * u64::from(TEXELS_IN_ROW)).max(1) as u32
}

/// A texture that steps of a session's plan read through, one after another.
struct Slot {
    format: TextureFormat,
    /// Its number among the textures of this format that one step reads.
    number: usize,
    rows: u32,
}

/// A range that is copied into a texture before a step.
struct Copy {
    slot: usize,
    offset: u64,
    bytes: u64,
}

/// A session's textures, and what they hold when.
pub(super) struct Texels {
    textures: Vec<api::Texture>,
    views: Vec<api::TextureView>,
    /// By step.
    copies: Vec<Vec<Copy>>,
}

impl Slot {
    fn bytes(&self) -> u64 {
        texel_bytes(self.format) * u64::from(TEXELS_IN_ROW) * u64::from(self.rows)
    }
}

impl Texels {
    /// What a plan's textures take: those of its weights, which whoever shares these shares, and a session's.
    pub fn beside(ready: &Ready<Gpu>) -> Beside {
        let mut of_weights: Vec<(usize, TextureFormat)> = Vec::new();
        for step in &ready.plan.steps {
            for (place, format) in step.bindings.iter().zip(&ready.pipelines[step.pipeline].formats) {
                if let (Place::Weight(at), Some(format)) = (place, *format)
                    && !of_weights.contains(&(*at, format))
                {
                    of_weights.push((*at, format));
                }
            }
        }
        let bytes = |&(at, format): &(usize, TextureFormat)| {
            let slot = Slot { format, number: 0, rows: rows(format, ready.weights[at].buffer.buffer.size()) };
            slot.bytes()
        };
        let session_bytes = Texels::slots(ready).0.iter().map(Slot::bytes).sum();
        Beside { weight_bytes: of_weights.iter().map(bytes).sum(), session_bytes }
    }

    /// The textures of a session, and by step what is copied into them.
    fn slots(ready: &Ready<Gpu>) -> (Vec<Slot>, Vec<Vec<Copy>>) {
        let mut slots: Vec<Slot> = Vec::new();
        let mut copies = Vec::new();
        for step in &ready.plan.steps {
            let formats = &ready.pipelines[step.pipeline].formats;
            let mut of_step: Vec<Copy> = Vec::new();
            for (place, format) in step.bindings.iter().zip(formats) {
                let (Place::Arena(range), Some(format)) = (place, *format) else { continue };
                let number = of_step.iter().filter(|copy| slots[copy.slot].format == format).count();
                let is_it = |slot: &Slot| (slot.format, slot.number) == (format, number);
                let slot = slots.iter().position(is_it).unwrap_or_else(|| {
                    slots.push(Slot { format, number, rows: 0 });
                    slots.len() - 1
                });
                slots[slot].rows = slots[slot].rows.max(rows(format, range.bytes));
                of_step.push(Copy { slot, offset: range.offset, bytes: range.bytes });
            }
            copies.push(of_step);
        }
        (slots, copies)
    }

    pub fn new(gpu: &Gpu, ready: &Ready<Gpu>) -> Result<Texels, ResourceError> {
        let (slots, copies) = Texels::slots(ready);
        let textures = slots.iter().map(|slot| gpu.texture("a session's texture", slot.format, slot.rows));
        let textures = textures.collect::<Result<Vec<_>, _>>()?;
        let views = textures.iter().map(|texture| texture.create_view(&api::TextureViewDescriptor::default()));
        Ok(Texels { views: views.collect(), textures, copies })
    }

    /// The textures of a step's bindings of the arena, in order.
    pub fn of_step(&self, step: usize) -> impl Iterator<Item = &api::TextureView> {
        self.copies[step].iter().map(|copy| &self.views[copy.slot])
    }

    pub fn is_copied_before(&self, step: usize) -> bool {
        !self.copies[step].is_empty()
    }

    /// Copies what `step` reads.
    pub fn copy(&self, encoder: &mut api::CommandEncoder, arena: &api::Buffer, step: usize) {
        for copy in &self.copies[step] {
            fill(encoder, arena, copy.offset, copy.bytes, &self.textures[copy.slot]);
        }
    }
}

impl Gpu {
    fn texture(&self, what: &'static str, format: TextureFormat, rows: u32) -> Result<api::Texture, ResourceError> {
        let descriptor = api::TextureDescriptor {
            label: Some(what),
            size: api::Extent3d { width: TEXELS_IN_ROW, height: rows, depth_or_array_layers: 1 },
            mip_level_count: 1,
            sample_count: 1,
            dimension: api::TextureDimension::D2,
            format,
            usage: api::TextureUsages::STORAGE_BINDING | api::TextureUsages::COPY_DST,
            view_formats: &[],
        };
        self.scoped(what, || self.device.create_texture(&descriptor))
    }
}

impl Constant {
    /// The constant read as `format`.
    ///
    /// # Errors
    /// The device has no memory for it.
    pub fn texture(&self, gpu: &Gpu, format: TextureFormat) -> Result<api::TextureView, ResourceError> {
        let mut textures = lock(&self.textures);
        if let Some((_, view)) = textures.iter().find(|(of, _)| *of == format) {
            return Ok(view.clone());
        }
        let bytes = self.buffer.size();
        let texture = gpu.texture("a weight's texture", format, rows(format, bytes))?;
        let mut encoder = gpu.device.create_command_encoder(&api::CommandEncoderDescriptor::default());
        fill(&mut encoder, &self.buffer, 0, bytes, &texture);
        gpu.queue.submit([encoder.finish()]);
        let view = texture.create_view(&api::TextureViewDescriptor::default());
        textures.push((format, view.clone()));
        Ok(view)
    }
}

/// Copies a range into a texture's rows; of the last one as much as there is.
fn fill(encoder: &mut api::CommandEncoder, buffer: &api::Buffer, offset: u64, bytes: u64, texture: &api::Texture) {
    let texel = texel_bytes(texture.format());
    let row_bytes = texel * u64::from(TEXELS_IN_ROW);
    let (whole, rest) = ((bytes / row_bytes) as u32, bytes % row_bytes);
    let mut copy = |row: u32, width: u32, height: u32| {
        let source = api::TexelCopyBufferInfo {
            buffer,
            layout: api::TexelCopyBufferLayout {
                offset: offset + u64::from(row) * row_bytes,
                bytes_per_row: Some(row_bytes as u32),
                rows_per_image: Some(height),
            },
        };
        let origin = api::Origin3d { x: 0, y: row, z: 0 };
        let to = api::TexelCopyTextureInfo { origin, ..texture.as_image_copy() };
        encoder.copy_buffer_to_texture(source, to, api::Extent3d { width, height, depth_or_array_layers: 1 });
    };
    if whole > 0 {
        copy(0, TEXELS_IN_ROW, whole);
    }
    if rest > 0 {
        copy(whole, rest.div_ceil(texel) as u32, 1);
    }
}
