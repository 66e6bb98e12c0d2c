"""The ops of comet_compile, their plain PyTorch twins and what runs them.

`ops` registers ``comet::moe_layer`` and its backward; the passes reach nothing else but `paths`,
which says for given tensors how a layer will run. `refs` is what the ops mean.

- any device and process group: `portable`, with `routing`, `grouped`, `experts`, `exchange`;
- one GPU: `fused` (`route_tiles`, then `layer0`, then `layer1`) and `fused_backward`
  (`layer_backward`, `grad_routing`, `grad_params`), with `plan`, `expert_weights`, `epilogue`,
  `launch`;
- GPUs of one machine: `fused_exchange`, made of the stages of `exchange_call`
  (`exchange_entry`, `exchange_kernels`, `layer0_exchange`, `layer1_exchange`, `exchange_sums`),
  with `tile_order`, `exchange_plan`, `workspace`, `sync`, `links`, `board`; `fused_replicated` with
  `layer1_all_reduce` where all of them have all tokens;
- which of these a call takes: `paths`, `exchange_paths`, `replicated_paths`;
- how it is planned: `plan`, changed by tables (`tuned`, `plan_changes`) or the cost model
  (`cost_model`, `backward_cost`, `unfused_cost`, `schedule`) with the numbers of a measured machine
  (`machine_file`, `link_rates`); `fuse_or_not` decides whether;
- what its CTAs do when: `trace`, from what `stamps` in the kernels have noted;
- a fused call of a kind that ran before: `recording`, which launches it again through
  `packed_launch`, without the Python of the modules above;
- `agreement` keeps ranks from running different plans.

Everything that imports Triton is imported when a GPU first needs it.
"""

# Installed under another name, the ops would be registered twice; torch takes the last silently.
if __name__ != "comet_compile.kernels":
    raise ImportError(
        f"this folder is installed as comet_compile.kernels, and was imported as {__name__!r}: the "
        "repository root is on sys.path. Import comet_compile.kernels, or run Python with -P."
    )
