"""Files of other tools, both ways: circuit-tracer's graphs, which Neuronpedia takes too, and circuits of EAP. What maps to what is in
docs/formats.md."""

from saebench.interop.circuit_tracer import read_circuit_tracer, write_circuit_tracer
from saebench.interop.eap import EapCircuit, eap_circuit, read_eap, write_eap

__all__ = ["write_circuit_tracer", "read_circuit_tracer", "EapCircuit", "eap_circuit", "write_eap", "read_eap"]
