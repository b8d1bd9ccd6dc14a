"""Time, memory, communication exposure and GPU telemetry of one computation."""
