"""Live figures and recent traces, without any outside tool."""
