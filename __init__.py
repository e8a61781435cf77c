"""DPM-Solver-v3 for ComfyUI, the WebUIs and k-diffusion. ComfyUI imports this file; so does `import dpm_solver_v3`."""

__version__ = "0.1.0"
