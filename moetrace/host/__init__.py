"""Everything that touches llama.cpp: finding it, running it under the tracer, feeding it, draining the rings."""
