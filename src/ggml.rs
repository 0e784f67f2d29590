//! Safe wrapper over the parts of ggml that the engine uses: graphs of custom operations, the quantizers, and
//! the dequantizers.
//!
//! ggml walks a graph's nodes on the caller's thread; a node's operation spreads its work over the engine's own
//! threads, whose waiting suits phones and busy machines better than ggml's spinning barrier.
//!
//! `GGML_ASSERT` aborts the process and cannot be caught, so every shape and type is checked here or by
//! the callers before ggml sees it.

use std::{
    ffi::{c_int, c_void},
    panic::{AssertUnwindSafe, catch_unwind},
    ptr::{self, NonNull},
    sync::{
        Arc, Once,
        atomic::{AtomicBool, Ordering},
    },
};

use ggml_sys as sys;

use crate::{
    dtype::DType,
    error::{Error, ErrorKind, Result},
    threads::ThreadPool,
};

/// Version of the ggml inside, for example `0.26.0`.
pub fn version() -> &'static str {
    // SAFETY: ggml returns a pointer to a string constant.
    unsafe { std::ffi::CStr::from_ptr(sys::ggml_version()) }.to_str().unwrap_or("unknown")
}

/// Quantizes rows of `row_len` elements from `src` with ggml's own quantizer and appends the bytes to `dst`.
///
/// `importance` holds one weight per column (an importance matrix), shared by all rows. Calls may run on
/// many threads at once. Errors with [`ErrorKind::InvalidArgument`] where lengths do not fit the type.
pub fn quantize(
    dtype: DType,
    src: &[f32],
    row_len: usize,
    importance: Option<&[f32]>,
    dst: &mut Vec<u8>,
) -> Result<()> {
    let row_bytes = row_bytes(dtype, src.len(), row_len)?;
    if importance.is_some_and(|weights| weights.len() != row_len) {
        return Err(Error::new(
            ErrorKind::InvalidArgument,
            "the importance matrix does not have one weight per column",
        ));
    }
    init();
    let rows = src.len() / row_len;
    let start = dst.len();
    dst.resize(start + rows * row_bytes, 0);
    // SAFETY: src holds rows * row_len floats, dst has room for rows * row_bytes, importance one float per column.
    let written = unsafe {
        sys::ggml_quantize_chunk(
            dtype.ggml_id(),
            src.as_ptr(),
            dst[start..].as_mut_ptr().cast(),
            0,
            rows as i64,
            row_len as i64,
            importance.map_or(ptr::null(), <[f32]>::as_ptr),
        )
    };
    debug_assert_eq!(written, rows * row_bytes);
    Ok(())
}

/// Dequantizes `src`, whole blocks of `dtype`, into `dst`: one f32 per element.
///
/// Errors with [`ErrorKind::InvalidArgument`] where the lengths do not match.
pub fn dequantize(dtype: DType, src: &[u8], dst: &mut [f32]) -> Result<()> {
    if dtype.row_bytes(dst.len() as u64) != Some(src.len() as u64) {
        return Err(Error::new(
            ErrorKind::InvalidArgument,
            format_args!("{} bytes are not {} elements of {dtype}", src.len(), dst.len()),
        ));
    }
    if dtype == DType::F32 {
        for (value, bytes) in dst.iter_mut().zip(src.chunks_exact(4)) {
            *value = f32::from_le_bytes(bytes.try_into().expect("chunks of four"));
        }
        return Ok(());
    }
    init();
    // SAFETY: the traits table is static; the lengths were checked above.
    unsafe {
        let to_float =
            (*sys::ggml_get_type_traits(dtype.ggml_id())).to_float.expect("every accepted type dequantizes");
        to_float(src.as_ptr().cast(), dst.as_mut_ptr(), dst.len() as i64);
    }
    Ok(())
}

/// A custom operation: what a graph node does.
pub(crate) trait Op: Send + Sync {
    /// Computes `args.output` from `args.inputs`. ggml calls it once, on the thread that computes the graph.
    fn run(&self, args: &OpArgs<'_>);
}

/// A node that is being computed.
pub(crate) struct OpArgs<'a> {
    /// Where the result goes.
    pub output: Tensor,
    /// Sources, in the order given to [`GraphBuilder::custom`].
    pub inputs: [Option<Tensor>; 2],
    pool: &'a ThreadPool,
}

impl OpArgs<'_> {
    /// Does work items `0..count` on all threads.
    pub fn each(&self, count: usize, work: impl Fn(usize) + Sync) {
        self.pool.run(count, &work);
    }

    /// Threads that [`OpArgs::each`] uses.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// Source `index`; the graph's builder gave it.
    pub fn input(&self, index: usize) -> Tensor {
        self.inputs[index].expect("the node was built with this source")
    }
}

/// A tensor of a graph.
#[derive(Clone, Copy)]
pub(crate) struct Tensor(NonNull<sys::ggml_tensor>);

// SAFETY: a handle; what threads do with the data is the operations' affair.
unsafe impl Sync for Tensor {}

impl Tensor {
    /// Address of the first element. Valid while the graph is being computed, and for its last node after.
    pub fn data<T>(self) -> *mut T {
        // SAFETY: tensors live as long as their graph's context.
        unsafe { self.0.as_ref().data.cast() }
    }

    /// Elements along dimension `axis`, fastest first.
    pub fn len(self, axis: usize) -> usize {
        // SAFETY: as above.
        unsafe { self.0.as_ref().ne[axis] as usize }
    }
}

/// Builds a [`Graph`] node by node.
pub(crate) struct GraphBuilder {
    context: NonNull<sys::ggml_context>,
    graph: NonNull<sys::ggml_cgraph>,
    pool: Arc<ThreadPool>,
    nodes: Vec<Node>,
}

/// A node's operation. Its address is the node's user data, so the vector of nodes is
/// made with room for all and never grows.
struct Node {
    op: Box<dyn Op>,
    pool: Arc<ThreadPool>,
    panicked: AtomicBool,
}

impl GraphBuilder {
    /// A builder with room for `nodes` nodes, which will run on `pool`.
    pub fn new(nodes: usize, pool: &Arc<ThreadPool>) -> Result<Self> {
        init();
        // SAFETY: with no_alloc set ggml only allocates the stated bookkeeping bytes, which cover all nodes.
        unsafe {
            let mem_size =
                (nodes + 8) * sys::ggml_tensor_overhead() + sys::ggml_graph_overhead_custom(nodes + 8, false);
            let context = NonNull::new(sys::ggml_init(sys::ggml_init_params {
                mem_size,
                mem_buffer: ptr::null_mut(),
                no_alloc: true,
            }))
            .ok_or_else(out_of_memory)?;
            let graph = NonNull::new(sys::ggml_new_graph_custom(context.as_ptr(), nodes + 8, false))
                .ok_or_else(out_of_memory)?;
            Ok(Self { context, graph, pool: pool.clone(), nodes: Vec::with_capacity(nodes) })
        }
    }

    /// Adds a node that computes a tensor of f32 `[columns, rows]` (columns fastest) from `inputs`.
    pub fn custom(&mut self, op: impl Op + 'static, shape: [usize; 2], inputs: &[Tensor]) -> Tensor {
        self.add(Box::new(op), sys::GGML_TYPE_F32, shape, inputs)
    }

    /// Adds a node whose result is `[bytes, rows]` of raw bytes.
    pub fn custom_bytes(&mut self, op: impl Op + 'static, shape: [usize; 2], inputs: &[Tensor]) -> Tensor {
        self.add(Box::new(op), sys::GGML_TYPE_I8, shape, inputs)
    }

    /// Allocates the intermediate results and finishes the graph; `last` is its result.
    pub fn finish(self, last: Tensor) -> Result<Graph> {
        let mut this = std::mem::ManuallyDrop::new(self);
        // SAFETY: context and graph are valid; the nodes vector is moved out exactly once, and the builder's
        // drop does not run.
        unsafe {
            let nodes = std::mem::take(&mut this.nodes);
            drop(ptr::read(&this.pool)); // the nodes have theirs
            let allocator = sys::ggml_gallocr_new(sys::ggml_backend_cpu_buffer_type());
            let caller = sys::ggml_threadpool_new(&mut sys::ggml_threadpool_params_default(1));
            let (context, graph) = (this.context, this.graph);
            let built = Graph { context, graph, allocator, caller, nodes, last, work: Vec::new() };
            if allocator.is_null()
                || caller.is_null()
                || !sys::ggml_gallocr_alloc_graph(allocator, graph.as_ptr())
            {
                return Err(out_of_memory());
            }
            Ok(built)
        }
    }

    fn add(
        &mut self,
        op: Box<dyn Op>,
        dtype: sys::ggml_type,
        shape: [usize; 2],
        inputs: &[Tensor],
    ) -> Tensor {
        assert!(
            inputs.len() <= 2 && self.nodes.len() < self.nodes.capacity(),
            "the graph was sized for its nodes"
        );
        self.nodes.push(Node { op, pool: self.pool.clone(), panicked: AtomicBool::new(false) });
        let node = self.nodes.last_mut().expect("just pushed");
        let mut sources: Vec<*mut sys::ggml_tensor> = inputs.iter().map(|t| t.0.as_ptr()).collect();
        // SAFETY: the context has room; sources are tensors of the same context; the node stays
        // where it is until the graph is freed.
        let tensor = unsafe {
            sys::ggml_custom_4d(
                self.context.as_ptr(),
                dtype,
                shape[0] as i64,
                shape[1] as i64,
                1,
                1,
                sources.as_mut_ptr(),
                sources.len() as c_int,
                Some(run_node),
                1,
                ptr::from_mut(node).cast(),
            )
        };
        // Now and not once at the end: ggml follows a chain of nodes that it has not met by recursion.
        // SAFETY: the graph has room for the node.
        unsafe { sys::ggml_build_forward_expand(self.graph.as_ptr(), tensor) };
        Tensor(NonNull::new(tensor).expect("ggml_custom_4d returns a tensor"))
    }
}

impl Drop for GraphBuilder {
    fn drop(&mut self) {
        // SAFETY: the context is owned and freed once.
        unsafe { sys::ggml_free(self.context.as_ptr()) }
    }
}

/// A graph ready to be computed again and again.
pub(crate) struct Graph {
    context: NonNull<sys::ggml_context>,
    graph: NonNull<sys::ggml_cgraph>,
    allocator: sys::ggml_gallocr_t,
    /// ggml's own pool, of the caller's thread alone.
    caller: *mut sys::ggml_threadpool,
    nodes: Vec<Node>,
    last: Tensor,
    work: Vec<u8>,
}

// SAFETY: the raw pointers are owned; nothing in ggml's context is bound to a thread.
unsafe impl Send for Graph {}

impl Graph {
    /// Runs all nodes. The result stays in [`Graph::result`] until the next run.
    pub fn compute(&mut self) -> Result<()> {
        // SAFETY: the graph is allocated, the work buffer is as large as ggml_graph_plan asks.
        let status = unsafe {
            let mut plan = sys::ggml_graph_plan(self.graph.as_ptr(), 1, self.caller);
            self.work.resize(plan.work_size.max(self.work.len()), 0);
            plan.work_data = self.work.as_mut_ptr();
            sys::ggml_graph_compute(self.graph.as_ptr(), &mut plan)
        };
        if self.nodes.iter().any(|node| node.panicked.load(Ordering::Relaxed)) {
            return Err(Error::new(ErrorKind::Backend, "a kernel panicked; what was read is lost"));
        }
        if status != sys::GGML_STATUS_SUCCESS {
            return Err(Error::new(
                ErrorKind::Backend,
                format_args!("ggml could not compute the graph (status {status})"),
            ));
        }
        Ok(())
    }

    /// The last node's f32 elements.
    pub fn result(&self) -> &[f32] {
        // SAFETY: the last node is an allocated, contiguous f32 tensor that nothing writes between runs.
        unsafe { std::slice::from_raw_parts(self.last.data(), self.last.len(0) * self.last.len(1)) }
    }

    /// Bytes of the intermediate results.
    pub fn buffer_bytes(&self) -> usize {
        // SAFETY: the allocator is valid and has one buffer.
        unsafe { sys::ggml_gallocr_get_buffer_size(self.allocator, 0) }
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: all are owned and freed once, and none is null.
        unsafe {
            if !self.allocator.is_null() {
                sys::ggml_gallocr_free(self.allocator);
            }
            if !self.caller.is_null() {
                sys::ggml_threadpool_free(self.caller);
            }
            sys::ggml_free(self.context.as_ptr());
        }
    }
}

/// What ggml calls for a node.
///
/// A panic must not unwind into C: it is kept in the node, and [`Graph::compute`] reports it.
unsafe extern "C" fn run_node(output: *mut sys::ggml_tensor, _ith: c_int, _nth: c_int, data: *mut c_void) {
    // SAFETY: data is the node's address, valid while the graph is; output is the node's tensor.
    let (node, tensor) = unsafe { (&*data.cast::<Node>(), NonNull::new_unchecked(output)) };
    // SAFETY: as above; ggml does not modify a tensor's sources while computing.
    let sources = unsafe { tensor.as_ref().src };
    let args = OpArgs {
        output: Tensor(tensor),
        inputs: [0, 1].map(|i| NonNull::new(sources[i]).map(Tensor)),
        pool: &node.pool,
    };
    if catch_unwind(AssertUnwindSafe(|| node.op.run(&args))).is_err() {
        node.panicked.store(true, Ordering::Relaxed);
    }
}

/// ggml's tables; safe to call often.
fn init() {
    static ONCE: Once = Once::new();
    // SAFETY: ggml's initialisers may be called once from any thread; the quantizers' tables are then read-only.
    ONCE.call_once(|| unsafe {
        sys::ggml_cpu_init();
        for dtype in DType::ALL {
            sys::ggml_quantize_init(dtype.ggml_id());
        }
    });
}

fn row_bytes(dtype: DType, len: usize, row_len: usize) -> Result<usize> {
    let whole = row_len > 0 && len.is_multiple_of(row_len);
    match dtype.row_bytes(row_len as u64) {
        Some(bytes) if whole => Ok(bytes as usize),
        _ => Err(Error::new(
            ErrorKind::InvalidArgument,
            format_args!("{len} elements do not make rows of {row_len} in blocks of {}", dtype.block_len()),
        )),
    }
}

fn out_of_memory() -> Error {
    Error::new(ErrorKind::Backend, "ggml could not allocate memory")
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fill;
    impl Op for Fill {
        fn run(&self, args: &OpArgs<'_>) {
            // SAFETY: i is below the row's length.
            args.each(args.output.len(0), |i| unsafe { *args.output.data::<f32>().add(i) += i as f32 });
        }
    }

    struct Square;
    impl Op for Square {
        fn run(&self, args: &OpArgs<'_>) {
            // SAFETY: both rows have the same length.
            args.each(args.output.len(0), |i| unsafe {
                let x = *args.input(0).data::<f32>().add(i);
                *args.output.data::<f32>().add(i) = x * x;
            });
        }
    }

    struct Panic;
    impl Op for Panic {
        fn run(&self, args: &OpArgs<'_>) {
            args.each(3, |i| assert_ne!(i, 1, "on purpose"));
        }
    }

    #[test]
    fn every_item_is_computed_once_on_any_number_of_threads() {
        for threads in [1, 2, 5] {
            let mut builder = GraphBuilder::new(2, &Arc::new(ThreadPool::new(threads).unwrap())).unwrap();
            let x = builder.custom(Fill, [1000, 1], &[]);
            let y = builder.custom(Square, [1000, 1], &[x]);
            let mut graph = builder.finish(y).unwrap();
            // SAFETY: Fill adds to its output, which the allocator leaves unset: make it zero.
            unsafe { ptr::write_bytes(x.data::<f32>(), 0, 1000) };
            graph.compute().unwrap();
            let expected: Vec<f32> = (0..1000).map(|i| (i * i) as f32).collect();
            assert_eq!(graph.result(), expected);
        }
    }

    #[test]
    fn a_panic_in_a_kernel_becomes_an_error() {
        let mut builder = GraphBuilder::new(1, &Arc::new(ThreadPool::new(2).unwrap())).unwrap();
        let x = builder.custom(Panic, [1, 1], &[]);
        let mut graph = builder.finish(x).unwrap();
        let error = graph.compute().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Backend);
    }

    #[test]
    fn quantizing_loses_little_and_refuses_odd_lengths() {
        let row: Vec<f32> = (0..512).map(|i| ((i * 37 % 101) as f32 - 50.0) / 50.0).collect();
        for dtype in DType::ALL {
            let mut bytes = Vec::new();
            quantize(dtype, &row, 256, Some(&[1.0; 256]), &mut bytes).unwrap();
            let mut back = vec![0.0; 512];
            dequantize(dtype, &bytes, &mut back).unwrap();
            let error: f32 = row.iter().zip(&back).map(|(a, b)| (a - b).powi(2)).sum::<f32>();
            let norm: f32 = row.iter().map(|a| a * a).sum();
            // A step of the largest value divided by 2^bits, and a factor for the coarse floats of MXFP4.
            let bound = 2.0f32.powf(-2.0 * (dtype.bits().min(9.0) as f32 - 1.5));
            assert!(error / norm <= bound, "{dtype}: {} > {bound}", error / norm);
            assert!(dequantize(dtype, &bytes[1..], &mut back).is_err());
        }
        assert!(quantize(DType::Q4_K, &row, 32, None, &mut Vec::new()).is_err());
        assert!(quantize(DType::Q8_0, &row, 0, None, &mut Vec::new()).is_err());
    }
}
