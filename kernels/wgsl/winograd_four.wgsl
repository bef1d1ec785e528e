// F(4×4, 3×3) along one side, at the points 0, ±√½, ±√2 and infinity: what comes before the product with the filter's coefficients, and
// after.
const LOW = 0.70710678118654752440f;
const HIGH = 1.41421356237309504880f;

fn forward(d: array<vec4<f32>, 6>) -> array<vec4<f32>, 6> {
    let near_even = d[4] - 2.0 * d[2];
    let near_odd = LOW * (d[3] - 2.0 * d[1]);
    let far_even = d[4] - 0.5 * d[2];
    let far_odd = HIGH * (d[3] - 0.5 * d[1]);
    return array<vec4<f32>, 6>(
        (d[0] + d[4]) - 2.5 * d[2],
        near_even + near_odd,
        near_even - near_odd,
        far_even + far_odd,
        far_even - far_odd,
        (d[1] + d[5]) - 2.5 * d[3],
    );
}

fn backward(m: array<vec4<f32>, 6>) -> array<vec4<f32>, 4> {
    let near_sum = m[1] + m[2];
    let near_difference = m[1] - m[2];
    let far_sum = m[3] + m[4];
    let far_difference = m[3] - m[4];
    return array<vec4<f32>, 4>(
        m[0] + (near_sum + far_sum),
        LOW * near_difference + HIGH * far_difference,
        0.5 * near_sum + 2.0 * far_sum,
        (0.5 * LOW * near_difference + 2.0 * HIGH * far_difference) + m[5],
    );
}
