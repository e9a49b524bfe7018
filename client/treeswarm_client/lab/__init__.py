"""A WAN lab: network namespaces on one Linux machine, and links of given delay, jitter, rate and loss between them."""

from treeswarm_client.lab.lab import Host, Lab, Traffic, wan_lab
from treeswarm_client.lab.namespaces import can_make_namespaces
from treeswarm_client.lab.shape import LabLink

__all__ = ["Host", "Lab", "LabLink", "Traffic", "can_make_namespaces", "wan_lab"]
