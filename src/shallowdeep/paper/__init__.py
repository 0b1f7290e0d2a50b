"""The ICML 2019 study (Kaya, Hong, Dumitras, arXiv 1810.07052), through the library's own public interface."""
