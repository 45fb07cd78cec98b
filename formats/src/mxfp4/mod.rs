//! mxfp4
