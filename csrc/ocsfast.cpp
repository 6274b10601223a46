// The extension module: the schema of every op, and what was built. No logic.
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>

#include "bound.h"
#include "cpu/isa.h"

// In all schemas:
//   tables, shapes, layout   a plan's (plan.h)
//   mask                     the groups to prune
//   bound                    the ticket of a plan that is bound to its weights (bound.h). It stands
//                            for them: an op that changes the weights, or their sums of squares, is
//                            said to change it
//   lam, factor              Eq. 8's λ, and what Eq. 9 multiplies by. They and lr are 0-dim tensors,
//                            each on the CPU or where the weights lie
//   known                    the sums of squares that an earlier op left are those of the weights
//                            as they are
STABLE_TORCH_LIBRARY(ocsfast, m) {
  // Checks a plan and the weights it is for, once.
  m.def("bind(Tensor[] weights, Tensor tables, Tensor shapes, int[] layout) -> Tensor");
  // Scores all groups in one read of the weights, and writes what each slice was scored by. `others`: a
  // tensor like each weight, for the criteria that need one.
  m.def(
      "group_saliency(Tensor(a!) bound, Tensor(b!) scores, Tensor(c!) slices, Tensor[] others,"
      " str criterion, bool known) -> ()");
  // Finds the groups to prune so that the cost is at most `budget`. `units`: of each family, what its
  // kept count is a multiple of. `ties`: the first family that each is tied to. give_back: of what goes
  // beyond the budget, what can stay does.
  m.def(
      "partition(Tensor scores, Tensor tables, int[] layout, Tensor cost_tables, int[] cost_layout,"
      " Tensor limits, Tensor budget, Tensor? units, Tensor? ties, bool give_back)"
      " -> (Tensor mask, Tensor cost, Tensor status)");
  // Eq. 9: w *= factor ** (pruned slices that contain the element). Leaves the sums of squares of the
  // pruned slices.
  m.def("shrink_(Tensor(a!) bound, Tensor mask, Tensor factor) -> ()");
  // Eq. 8: grad += lam * w / |slice|, for each pruned slice that contains the element.
  m.def(
      "lasso_grad_(Tensor(a!) bound, Tensor(b!)[] grads, Tensor mask, Tensor lam, bool known) -> "
      "()");
  // A step of SGD. With a mask also Eq. 8 before and Eq. 9 after it, in the same pass, which leaves the
  // sums of squares of all slices. `first`: the weights whose momentum holds nothing yet.
  m.def(
      "sgd_step_(Tensor(a!) bound, Tensor[] grads, Tensor(b!)[] momenta, int[] first, Tensor lr,"
      " float momentum, float dampening, float weight_decay, bool nesterov, bool maximize, Tensor? mask,"
      " Tensor? lam, Tensor? factor, bool known, Tensor? grad_scale, Tensor? found_inf) -> ()");
  // The same for AdamW. `steps`: how many steps each weight has taken; the op adds this one.
  m.def(
      "adamw_step_(Tensor(a!) bound, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,"
      " Tensor(d!)[] steps, Tensor lr, float beta1, float beta2, float eps, float weight_decay,"
      " bool maximize, Tensor? mask, Tensor? lam, Tensor? factor, bool known, Tensor? grad_scale,"
      " Tensor? found_inf) -> ()");
  // Tells all that a check reads of a partition, beside earlier ones: Eq. 3 against `first`, what has
  // changed since `last` (kFacts in plan.h).
  m.def(
      "compare(Tensor mask, Tensor sizes, Tensor cost, Tensor status, Tensor? first, Tensor? last,"
      " Tensor tables, int[] layout) -> Tensor");
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled ops of ocsfast, registered as torch.ops.ocsfast.*";
  // Not an op: Python's garbage collector calls it at any time, also while torch traces a graph.
  m.def("release", &ocsfast::release, "Forget what is bound under a ticket's number.");
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
        info["instruction_set"] = ocsfast::cpu::isa_name();
        return info;
      },
      "What this extension was built with: version, cuda, cuda_version, cuda_archs, compiler, "
      "torch_target; and the instruction_set that the CPU's kernels use here.");
}
