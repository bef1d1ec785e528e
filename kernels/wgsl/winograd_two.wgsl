// F(2×2, 3×3) along one side, at the points 0, ±1 and infinity: what comes before the product with the filter's coefficients, and after.
fn forward(d: array<vec4<f32>, 4>) -> array<vec4<f32>, 4> {
    return array<vec4<f32>, 4>(d[0] - d[2], d[1] + d[2], d[2] - d[1], d[3] - d[1]);
}

fn backward(m: array<vec4<f32>, 4>) -> array<vec4<f32>, 2> {
    return array<vec4<f32>, 2>(m[0] + (m[1] + m[2]), m[3] + (m[1] - m[2]));
}
