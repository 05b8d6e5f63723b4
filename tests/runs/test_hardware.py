"""What is said about the machine."""

import torch

from vidattn.runs.hardware import hardware


def test_hardware_names_the_machine():
    machine = hardware()
    assert machine["cpu"] and machine["num_cores"] >= 1
    assert machine["num_threads"] == torch.get_num_threads()
