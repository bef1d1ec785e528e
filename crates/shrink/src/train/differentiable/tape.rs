//! Functions of slices with their derivatives, as operations that candle records.

use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Result, Shape, Storage, Tensor, bail};

/// A contiguous tensor of f32.
#[derive(Clone, Copy)]
pub(crate) struct View<'a> {
    pub data: &'a [f32],
    pub shape: &'a [usize],
}

/// A function of one to three tensors.
pub(crate) trait Function: Send + Sync + 'static {
    const NAME: &'static str;

    /// The result, row-major, and its shape.
    fn forward(&self, args: &[View<'_>]) -> (Vec<f32>, Vec<usize>);

    /// The gradient of every argument that `needs` one, from that of the result.
    fn backward(&self, args: &[View<'_>], y: View<'_>, dy: View<'_>, needs: &[bool]) -> Vec<Option<Vec<f32>>>;
}

/// `function` of `args`, recorded where one of them is.
pub(crate) fn apply<F: Function>(function: F, args: &[&Tensor]) -> Result<Tensor> {
    let recorded = Recorded(function);
    match *args {
        [a] => a.contiguous()?.apply_op1(recorded),
        [a, b] => a.contiguous()?.apply_op2(&b.contiguous()?, recorded),
        [a, b, c] => a.contiguous()?.apply_op3(&b.contiguous()?, &c.contiguous()?, recorded),
        _ => bail!("{}: {} arguments", F::NAME, args.len()),
    }
}

/// Reads a contiguous tensor of f32 where it lies.
pub(crate) fn read<T>(tensor: &Tensor, work: impl FnOnce(View<'_>) -> T) -> Result<T> {
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => Ok(work(view(storage, layout)?)),
        _ => bail!("a tensor that is not in the memory of the CPU"),
    }
}

/// Reads several.
fn read_all<'a, T>(
    tensors: &[&Tensor],
    views: &mut Vec<View<'a>>,
    work: &mut dyn FnMut(&[View<'_>]) -> Result<T>,
) -> Result<T> {
    match tensors {
        [] => work(views),
        [first, rest @ ..] => read(first, |view| {
            let mut views: Vec<View<'_>> = views.iter().copied().chain([view]).collect();
            read_all(rest, &mut views, work)
        })?,
    }
}

pub(crate) fn view<'a>(storage: &'a CpuStorage, layout: &'a Layout) -> Result<View<'a>> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(values), Some((start, end))) => Ok(View { data: &values[start..end], shape: layout.dims() }),
        (CpuStorage::F32(_), None) => bail!("a tensor that is not contiguous: {layout:?}"),
        _ => bail!("a tensor that is not f32"),
    }
}

struct Recorded<F>(F);

impl<F: Function> Recorded<F> {
    fn run(&self, args: &[(&CpuStorage, &Layout)]) -> Result<(CpuStorage, Shape)> {
        let views = args.iter().map(|(storage, layout)| view(storage, layout)).collect::<Result<Vec<_>>>()?;
        let (values, shape) = self.0.forward(&views);
        Ok((CpuStorage::F32(values), shape.into()))
    }

    fn gradients(&self, args: &[&Tensor], y: &Tensor, dy: &Tensor) -> Result<Vec<Option<Tensor>>> {
        let needs: Vec<bool> = args.iter().map(|a| a.track_op()).collect();
        let dy = dy.contiguous()?;
        let gradients = read_all(args, &mut Vec::new(), &mut |views| {
            read(y, |y| read(&dy, |dy| self.0.backward(views, y, dy, &needs)))?
        })?;
        let tensors = args.iter().zip(gradients).map(|(arg, gradient)| {
            gradient.map(|values| Tensor::from_vec(values, arg.shape(), arg.device())).transpose()
        });
        tensors.collect()
    }
}

impl<F: Function> CustomOp1 for Recorded<F> {
    fn name(&self) -> &'static str {
        F::NAME
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        self.run(&[(s, l)])
    }

    fn bwd(&self, a: &Tensor, y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        Ok(self.gradients(&[a], y, dy)?.swap_remove(0))
    }
}

impl<F: Function> CustomOp2 for Recorded<F> {
    fn name(&self) -> &'static str {
        F::NAME
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        self.run(&[(s1, l1), (s2, l2)])
    }

    fn bwd(&self, a: &Tensor, b: &Tensor, y: &Tensor, dy: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let mut gradients = self.gradients(&[a, b], y, dy)?.into_iter();
        Ok((gradients.next().flatten(), gradients.next().flatten()))
    }
}

impl<F: Function> CustomOp3 for Recorded<F> {
    fn name(&self) -> &'static str {
        F::NAME
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.run(&[(s1, l1), (s2, l2), (s3, l3)])
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        c: &Tensor,
        y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let mut gradients = self.gradients(&[a, b, c], y, dy)?.into_iter();
        Ok((gradients.next().flatten(), gradients.next().flatten(), gradients.next().flatten()))
    }
}
