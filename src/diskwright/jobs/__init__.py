"""Jobs: long operations that can be watched, paused, throttled, completed and cancelled."""
