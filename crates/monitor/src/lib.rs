//! Windows, sketches and tests that judge a version in service: pure, no clock, no file.
