//! Trains a model to answer as another does, or as labels say.
//!
//!     fit STUDENT.onnx TEACHER.onnx|- DATA.safetensors HELD_OUT.safetensors FIT.json OUT.onnx
//!
//! A file of data has a tensor for each input, a row for each sample, and `labels` where there are some. `STUDENT.onnx:0,2,4` is a student of these
//! layers of the model.

use cutover_backend::{CpuOptions, cpu};
use cutover_graph::onnx::{ImportOptions, encode, import_bytes};
use cutover_shrink::{
    Data,
    train::{Fit, fit, student_of},
};
use cutover_tensor::{DType, Tensor};
use safetensors::{Dtype, SafeTensors};
use std::{error::Error, fs, ops::ControlFlow};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [student, teacher, data, held_out, options, output] = &arguments[..] else {
        return Err("usage: fit STUDENT[:LAYERS] TEACHER|- DATA HELD_OUT FIT OUT".into());
    };
    let open = |path: &str| -> Result<_, Box<dyn Error>> {
        Ok(import_bytes(fs::read(path)?.into(), None, &ImportOptions::default())?)
    };
    let student = match student.split_once(':') {
        Some((path, layers)) => {
            let layers = layers.split(',').map(str::parse).collect::<Result<Vec<usize>, _>>()?;
            student_of(&open(path)?, &layers)?.0
        }
        None => open(student)?,
    };
    let teacher = if teacher == "-" { None } else { Some(open(teacher)?) };
    let (data, held_out) = (read(data)?, read(held_out)?);
    let options: Fit = serde_json::from_slice(&fs::read(options)?)?;
    let threads = std::env::var("RAYON_NUM_THREADS").ok().and_then(|n| n.parse().ok()).unwrap_or(0);
    let backend = cpu(CpuOptions { threads, ..CpuOptions::default() })?;
    let mut last = None;
    let fitted = fit(&student, teacher.as_ref(), &data, Some(&held_out), &options, &backend, &mut |p| {
        if p.metric != last || p.step % 50 == 0 || p.step == 1 {
            last = p.metric;
            let (metric, left) = (p.metric.unwrap_or(f64::NAN), p.left.map_or(0.0, |d| d.as_secs_f64() / 60.0));
            println!(
                "step {} of {}: loss {:.5}, {} {metric:.5}, rate {:.2e}, {:.1} samples/s, {left:.1} min left",
                p.step, p.steps, p.loss, p.metric_name, p.rate, p.samples_per_second
            );
        }
        ControlFlow::Continue(())
    })?;
    for point in &fitted.curve {
        println!("{}", serde_json::to_string(point)?);
    }
    println!("{:.2} samples/s", fitted.samples_per_second);
    Ok(fs::write(output, encode(&fitted.graph)?)?)
}

/// Every row of the file as a sample; of `input_ids` with an `attention_mask`, without what is padded.
fn read(path: &str) -> Result<Data, Box<dyn Error>> {
    let bytes = fs::read(path)?;
    let file = SafeTensors::deserialize(&bytes)?;
    let names: Vec<&str> = file.names();
    // Inputs that do not agree on how many rows there are make one sample.
    let extents: Vec<usize> = file.tensors().iter().map(|(_, t)| t.shape().first().copied().unwrap_or(1)).collect();
    let rows = if extents.iter().all(|e| *e == extents[0]) { extents[0] } else { 1 };
    let mut data = Data::default();
    let integers = |name: &str, row: usize| -> Option<Vec<i64>> {
        let tensor = file.tensor(name).ok()?;
        let width = tensor.data().len() / rows;
        let bytes = tensor.data()[row * width..][..width].chunks_exact(8);
        Some(bytes.map(|b| i64::from_le_bytes(b.try_into().expect("eight bytes"))).collect())
    };
    for row in 0..rows {
        let length = integers("attention_mask", row).map(|mask| mask.iter().sum::<i64>() as usize);
        let mut sample = Vec::new();
        for name in names.iter().filter(|name| **name != "labels") {
            let tensor = file.tensor(name)?;
            let (dtype, size) = match tensor.dtype() {
                Dtype::F32 => (DType::F32, 4),
                Dtype::I64 => (DType::I64, 8),
                other => return Err(format!("'{name}' is {other:?}").into()),
            };
            let mut shape = tensor.shape().to_vec();
            shape[0] /= rows;
            let width = tensor.data().len() / rows;
            let mut bytes = &tensor.data()[row * width..][..width];
            if let (Some(length), 2) = (length, shape.len()) {
                shape[1] = length;
                bytes = &bytes[..length * size];
            }
            sample.push((name.to_string(), Tensor::from_bytes(dtype, shape, bytes)?.into()));
        }
        data.samples.push(sample);
    }
    data.labels = (0..rows).map(|row| integers("labels", row)).collect();
    Ok(data)
}
