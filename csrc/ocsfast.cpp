// The extension module: every op's schema, and what was built. No logic.
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>

// Throughout: `tables`, `shapes` and `layout` are a plan's (csrc/plan.h), `mask` the groups to prune.
STABLE_TORCH_LIBRARY(ocsfast, m) {
  // Eq. 2 of all groups, and the sum of squares of each slice, in one read of the weights.
  m.def(
      "group_saliency(Tensor[] weights, Tensor tables, Tensor shapes, int[] layout, bool squared)"
      " -> (Tensor scores, Tensor slice_sq)");
  // The groups to prune so that the cost is at most `budget`.
  m.def(
      "partition(Tensor scores, Tensor tables, int[] layout, Tensor cost_tables, int[] cost_layout,"
      " Tensor limits, int round_to, Tensor budget) -> (Tensor mask, Tensor cost, Tensor status)");
  // Eq. 9: w *= factor ** (pruned slices that contain the element).
  m.def(
      "shrink_(Tensor(a!)[] weights, Tensor tables, Tensor shapes, int[] layout, Tensor mask, Tensor "
      "factor)"
      " -> ()");
  // Eq. 8: grad += strength * w / |slice|, for each pruned slice that contains the element.
  m.def(
      "lasso_grad_(Tensor(a!)[] grads, Tensor[] weights, Tensor tables, Tensor shapes, int[] layout,"
      " Tensor mask, Tensor strength) -> ()");
  // Eq. 3: how alike the kept sets of two partitions are.
  m.def("jaccard(Tensor mask_a, Tensor mask_b, Tensor tables, int[] layout) -> Tensor");
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled ops of ocsfast, registered as torch.ops.ocsfast.*";
  m.def(
      "build_info",
      [] {
        pybind11::dict info;
        info["version"] = OCSFAST_VERSION;
        info["cuda"] = static_cast<bool>(OCSFAST_CUDA);
        info["cuda_version"] = OCSFAST_CUDA_VERSION;
        info["cuda_archs"] = OCSFAST_CUDA_ARCHS;
        info["compiler"] = __VERSION__;
        info["torch_target"] = OCSFAST_TORCH_TARGET;
        return info;
      },
      "What this extension was built with: version, cuda, cuda_version, cuda_archs, compiler, "
      "torch_target.");
}
