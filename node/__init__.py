"""radnode: studies in by C-STORE, models on the GPU, DICOM SEG and Structured Reports back to the PACS."""

__version__ = "0.1.0"
