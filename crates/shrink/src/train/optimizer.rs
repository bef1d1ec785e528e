//! AdamW (Loshchilov and Hutter 2019), the schedule of its rate, and the bound on gradients. candle's own keeps its moments to itself, so that a run
//! could not be resumed.

use super::{
    Fit, Schedule,
    differentiable::{read, view},
};
use candle_core::{CpuStorage, InplaceOp2, Layout, Result, Tensor, Var, bail};
use std::sync::Mutex;

const BETA1: f64 = 0.9;
const BETA2: f64 = 0.999;
const EPSILON: f64 = 1e-8;

/// The running means of a weight's gradient and of its square.
#[derive(Clone, Debug)]
pub(super) struct Moments {
    pub first: Vec<f32>,
    pub second: Vec<f32>,
}

impl Moments {
    pub fn zeros(count: usize) -> Moments {
        Moments { first: vec![0.0; count], second: vec![0.0; count] }
    }
}

/// The rate of step `step` of `steps`, counted from 0.
pub(super) fn rate(options: &Fit, step: usize, steps: usize) -> f64 {
    let warm = (options.warmup * steps as f64).floor();
    let step = step as f64;
    if step < warm {
        return options.rate * (step + 1.0) / warm;
    }
    let done = (step - warm) / (steps as f64 - warm).max(1.0);
    options.rate
        * match options.schedule {
            Schedule::Constant => 1.0,
            Schedule::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * done).cos()),
            Schedule::Linear => 1.0 - done,
        }
}

/// What gradients are multiplied by so that their norm over all weights is at most `bound`; 0 for no bound.
///
/// # Errors
/// One that is not finite: the training has diverged.
pub(super) fn clip_factor(gradients: &[Option<Tensor>], bound: f64) -> Result<f64> {
    let mut squares = 0.0;
    for gradient in gradients.iter().flatten() {
        let square = |x: &f32| f64::from(*x) * f64::from(*x);
        squares +=
            read(gradient, |view| view.data.chunks(4096).map(|c| c.iter().map(square).sum::<f64>()).sum::<f64>())?;
    }
    let norm = squares.sqrt();
    if !norm.is_finite() {
        bail!("the gradient is {norm}: the rate is too high, or the data is not finite");
    }
    Ok(if bound > 0.0 && norm > bound { bound / norm } else { 1.0 })
}

/// One step of one weight.
pub(super) struct Step<'a> {
    pub moments: Mutex<&'a mut Moments>,
    pub rate: f64,
    /// 0 for what must not decay.
    pub decay: f64,
    /// Counted from 1.
    pub number: usize,
    /// What the gradient is multiplied by.
    pub factor: f64,
}

impl Step<'_> {
    pub fn take(&self, weight: &Var, gradient: &Tensor) -> Result<()> {
        weight.as_tensor().inplace_op2(gradient, self)
    }
}

impl InplaceOp2 for Step<'_> {
    fn name(&self) -> &'static str {
        "AdamW"
    }

    fn cpu_fwd(&self, weight: &mut CpuStorage, layout: &Layout, gradient: &CpuStorage, of: &Layout) -> Result<()> {
        let (CpuStorage::F32(weight), Some((start, end))) = (weight, layout.contiguous_offsets()) else {
            bail!("a weight that is not contiguous f32");
        };
        let gradient = view(gradient, of)?.data;
        let Ok(mut moments) = self.moments.lock() else { bail!("a step that failed before") };
        let Moments { first, second } = &mut **moments;
        let corrections = [1.0 - BETA1.powi(self.number as i32), 1.0 - BETA2.powi(self.number as i32)];
        let (size, root) = ((self.rate / corrections[0]) as f32, corrections[1].sqrt().recip() as f32);
        let keep = (1.0 - self.rate * self.decay) as f32;
        let (b1, b2, factor) = (BETA1 as f32, BETA2 as f32, self.factor as f32);
        // Not by subtraction of what is rounded already.
        let (n1, n2) = ((1.0 - BETA1) as f32, (1.0 - BETA2) as f32);
        let moments = first.iter_mut().zip(second.iter_mut());
        for ((w, g), (m, v)) in weight[start..end].iter_mut().zip(gradient).zip(moments) {
            let g = g * factor;
            *m = b1 * *m + n1 * g;
            *v = b2 * *v + n2 * g * g;
            *w = *w * keep - size * *m / (v.sqrt() * root + EPSILON as f32);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn steps_are_those_of_the_paper() {
        // One weight, three gradients, by hand in f64.
        let weight = Var::from_vec(vec![0.5f32], 1, &Device::Cpu).unwrap();
        let mut moments = Moments::zeros(1);
        let (mut w, mut m, mut v) = (0.5f64, 0.0, 0.0);
        for (i, g) in [0.3f64, -0.1, 0.7].into_iter().enumerate() {
            let number = i + 1;
            let step = Step { moments: Mutex::new(&mut moments), rate: 0.1, decay: 0.2, number, factor: 1.0 };
            step.take(&weight, &Tensor::new(&[g as f32], &Device::Cpu).unwrap()).unwrap();
            m = 0.9 * m + 0.1 * g;
            v = 0.999 * v + 0.001 * g * g;
            let (mh, vh) = (m / (1.0 - 0.9f64.powi(number as i32)), v / (1.0 - 0.999f64.powi(number as i32)));
            w -= 0.1 * (mh / (vh.sqrt() + 1e-8) + 0.2 * w);
        }
        let got = weight.as_tensor().to_vec1::<f32>().unwrap()[0];
        assert!((f64::from(got) - w).abs() < 1e-6, "{got}, expected {w}");
    }

    #[test]
    fn the_rate_rises_and_falls() {
        let fit = |schedule| Fit { rate: 2.0, warmup: 0.1, schedule, ..Fit::default() };
        let cosine = fit(Schedule::Cosine);
        assert_eq!([0, 9, 10].map(|s| rate(&cosine, s, 100)), [0.2, 2.0, 2.0]);
        assert!((rate(&cosine, 55, 100) - 1.0).abs() < 1e-9 && rate(&cosine, 99, 100) < 0.01);
        assert!((rate(&fit(Schedule::Linear), 55, 100) - 1.0).abs() < 1e-9);
        assert_eq!(rate(&fit(Schedule::Constant), 99, 100), 2.0);
    }

    #[test]
    fn long_gradients_are_shortened() {
        let gradient = |values: &[f32]| Some(Tensor::new(values, &Device::Cpu).unwrap());
        let both = [gradient(&[3.0]), None, gradient(&[0.0, 4.0])];
        assert_eq!(clip_factor(&both, 1.0).unwrap(), 0.2);
        assert_eq!((clip_factor(&both, 0.0).unwrap(), clip_factor(&both, 6.0).unwrap()), (1.0, 1.0));
        assert!(clip_factor(&[gradient(&[f32::NAN])], 1.0).is_err());
    }
}
