"""Gates, plans and the control of phases."""
