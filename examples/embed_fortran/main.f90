! HMC of 16 chains on a 16 x 16 lattice from Fortran, and the mean action of the last fields.
program embed_fortran
  use lfq
  implicit none
  integer(c_int64_t), parameter :: n_chains = 16, volume = 256
  type(lfq_phi4) :: theory
  type(lfq_hmc) :: hmc
  real(c_double) :: phi(16, 16, n_chains), action(n_chains), dh(n_chains, 200)
  character(c_char), allocatable :: workspace(:)
  integer(c_size_t) :: bytes

  theory = lfq_phi4(ndim=2, extent=[16, 16, 1, 1], beta=0.634d0, lam=0.5d0)
  hmc%n_samples = 200
  hmc%seed = 1
  bytes = max(lfq_hmc_workspace_f64(c_null_ptr, theory, n_chains, 0), lfq_phi4_workspace_f64(theory, n_chains, 0))
  allocate (workspace(bytes))

  call check(lfq_normal_f64(1_c_int64_t, lfq_purpose_start, 0_c_int64_t, 0_c_int64_t, n_chains, volume, phi, 0))
  phi = 0.5d0 * phi
  call check(lfq_hmc_f64(c_null_ptr, theory, hmc, n_chains, phi, c_null_ptr, dh, c_null_ptr, c_null_ptr, c_null_ptr, &
      c_null_ptr, workspace, bytes, 0))
  call check(lfq_phi4_action_f64(theory, n_chains, phi, action, workspace, bytes, 0))
  print "(es24.17)", action

contains

  subroutine check(status)
    integer(c_int), intent(in) :: status
    if (status == lfq_ok) return
    print "(2a)", "lfq: ", lfq_last_error()
    error stop 1
  end subroutine

end program
