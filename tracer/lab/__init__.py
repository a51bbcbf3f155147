# SPDX-License-Identifier: Apache-2.0
"""A small Kubernetes-like cluster on one machine, out of network namespaces.

Two nodes, their pods and services, a real CoreDNS with two replicas, and the world outside with
its resolver. It serves the demo, the tests and the benchmarks. It needs root and the usual
tools, no virtual machine, and touches nothing that it did not make.
"""

from tracer.lab.errors import LabError
from tracer.lab.lab import DEFAULT_POD, Lab, RunningPod, enter, enter_node

__all__ = ["DEFAULT_POD", "Lab", "LabError", "RunningPod", "enter", "enter_node"]
