import os

# Before torch is imported: threads that spin while they wait take the cores from pytest's other processes. On two busy
# cores three steps of a resnet34 took 37 s of CPU time so, and 4 s otherwise.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from resnet_fused import deferred

deferred.LEAST_ELEMENTS = 0  # here, and in the processes that tests start: theirs are small tensors
